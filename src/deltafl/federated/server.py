"""The server: what it holds between rounds, whom it asks, and how it moves."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from deltafl.algebra.aggregate import Aggregate, Stepped
from deltafl.algebra.tensors import Tensors
from deltafl.federated.recipe import FederatedRecipe
from deltafl.seeding import keyed_generator
from deltafl.training.step import lr_at


@dataclass(frozen=True)
class ServerState:
    """All that a round starts from; a round makes a new one and changes nothing in the old.

    round: rounds done. params: the model (see `client.moving`). m, v: moments of the server optimiser. control: c of
    scaffold, (P,); control_rounds: client -> the round that its own c_i is from. accuracy: the last validated. best:
    the parameters with the best validation accuracy, after which round, and how many validations ago.
    """

    round: int
    params: Mapping[str, Tensor]
    m: Mapping[str, Tensor] = field(default_factory=dict)
    v: Mapping[str, Tensor] = field(default_factory=dict)
    control: Tensor | None = None
    control_rounds: Mapping[int, int] = field(default_factory=dict)
    accuracy: float | None = None
    best: Mapping[str, Tensor] = field(default_factory=dict)
    best_round: int = 0
    best_score: float = -math.inf
    waited: int = 0


def choose_clients(recipe: FederatedRecipe, number: int) -> list[int]:
    """round(C K) clients without replacement, ascending; a function of (seed, round)."""
    generator = keyed_generator(recipe.seed, "clients", number)
    return sorted(
        torch.randperm(recipe.num_clients, generator=generator)[: recipe.clients_per_round].tolist()
    )


def steps_of(recipe: FederatedRecipe, client: int) -> int:
    """Local steps of a client, the same in every round: round(J S^u), u uniform in [-1, 1], at least 1."""
    if recipe.local_steps_spread == 1:
        return recipe.local_steps
    u = 2 * torch.rand((), generator=keyed_generator(recipe.seed, "local steps", client)).item() - 1
    return max(1, round(recipe.local_steps * recipe.local_steps_spread**u))


def round_lr(recipe: FederatedRecipe, number: int) -> float:
    """The local learning rate of a round (from 1)."""
    return lr_at(number - 1, recipe.num_rounds, 0, recipe.lr, recipe.lr_schedule)


def server_step(
    state: ServerState, update: Aggregate, recipe: FederatedRecipe, trained: set[str]
) -> ServerState:
    """theta <- theta + server_lr * u, with u from the pseudo-gradient R, for sgd without momentum R itself.

    sgd: m <- beta m + R, u = m. fedadam: m <- b1 m + (1 - b1) R, v <- b2 v + (1 - b2) R^2; fedyogi:
    v <- v - (1 - b2) R^2 sign(v - R^2); fedadagrad: v <- v + R^2; u = m / (sqrt(v) + tau), v from tau^2 (arXiv
    2003.00295, without bias correction as there). Only what is in `trained` has moments; the rest (running
    statistics) moves by R under them. It is `aggregation.Stepped` in every case.
    """
    beta1 = recipe.server_momentum
    if beta1 is None:
        beta1 = 0.0 if recipe.server_optimizer == "sgd" else 0.9
    if recipe.server_optimizer == "sgd" and beta1 == 0:
        return replace(state, params=dict(Stepped(state.params, update, recipe.server_lr)))
    directions, m, v = dict(update), {}, {}
    for name in trained:
        R = directions[name]
        old_m = state.m.get(name, torch.zeros_like(R))
        if recipe.server_optimizer == "sgd":
            directions[name] = m[name] = beta1 * old_m + R
            continue
        old_v = state.v.get(name, torch.full_like(R, recipe.server_tau**2))
        m[name] = beta1 * old_m + (1 - beta1) * R
        v[name] = _second_moment(recipe, old_v, R.square())
        directions[name] = m[name] / (v[name].sqrt() + recipe.server_tau)
    scaled: Tensors = directions
    params = dict(
        Stepped(state.params, scaled, lambda name: recipe.server_lr if name in trained else 1.0)
    )
    return replace(state, params=params, m=m, v=v)


def _second_moment(recipe: FederatedRecipe, v: Tensor, square: Tensor) -> Tensor:
    if recipe.server_optimizer == "fedadagrad":
        return v + square
    if recipe.server_optimizer == "fedyogi":
        return v - (1 - recipe.server_beta2) * square * torch.sign(v - square)
    return recipe.server_beta2 * v + (1 - recipe.server_beta2) * square
