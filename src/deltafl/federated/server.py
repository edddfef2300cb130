"""The server: its settings, what it holds between rounds, and how it moves."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from deltafl.algebra.aggregate import Aggregate, Stepped
from deltafl.errors import DeltaflError
from deltafl.recipes import one_of
from deltafl.rules.building import build_rule, load_rules
from deltafl.rules.parameters import RuleParameters
from deltafl.rules.rule import Rule, refuse_examples


class ServerRecipe(RuleParameters):
    """How the server turns the updates of a round into a step."""

    aggregator: Annotated[str, one_of(load_rules)] = Field(
        "fedavg", description="any method of `deltafl rules`"
    )
    client_weights: Literal["examples", "uniform"] = Field(
        "examples", description="what a rule weighs clients by"
    )
    server_optimizer: Annotated[str, one_of(lambda: SERVER_OPTIMIZERS)] = Field(
        "sgd", description="what acts on the rule's update: sgd, fedadam, fedyogi or fedadagrad"
    )
    server_lr: float = Field(1.0, gt=0, description="learning rate of the server's step")
    server_momentum: float | None = Field(
        None, ge=0, lt=1, description="of the server's optimiser (0 for sgd, 0.9 for the others)"
    )
    server_beta2: float = Field(0.99, ge=0, lt=1, description="of fedadam and fedyogi")
    server_tau: float = Field(1e-3, gt=0, description="of the adaptive server optimisers")

    def problems(self) -> Iterator[str]:
        try:
            self.rule()
        except DeltaflError as error:
            yield from error.problems

    def rule(self, seed: int = 0) -> Rule:
        """The aggregation rule; one that draws (dare) draws by `seed`, unless its own is given.

        Raises:
            DeltaflError: no such rule or parameter.
        """
        rule = load_rules()[self.aggregator]
        made = build_rule(self.aggregator, rule.seeded(self.params, seed))
        refuse_examples(made)
        return made


@dataclass(frozen=True)
class ServerState:
    """All that a round starts from; a round makes a new one and changes nothing in the old.

    round: rounds done. params: the model (see `client.state_of`). m, v: moments of the server
    optimiser. control: c of scaffold, (k,).
    """

    round: int
    params: Mapping[str, Tensor]
    m: Mapping[str, Tensor] = field(default_factory=dict)
    v: Mapping[str, Tensor] = field(default_factory=dict)
    control: Tensor | None = None


SERVER_OPTIMIZERS: Mapping[str, Callable[[Tensor, Tensor, float], Tensor] | None] = {
    "sgd": None,
    "fedadagrad": lambda v, square, b2: v + square,
    "fedadam": lambda v, square, b2: b2 * v + (1 - b2) * square,
    "fedyogi": lambda v, square, b2: v - (1 - b2) * square * torch.sign(v - square),
}
"""Name -> (v, R^2, beta2) -> the new v."""


def server_step(
    state: ServerState, update: Aggregate, recipe: ServerRecipe, trained: set[str]
) -> ServerState:
    """theta <- theta + server_lr * u, with u from the pseudo-gradient R, for sgd without momentum
    R itself.

    sgd: m <- beta m + R, u = m. fedadam: m <- b1 m + (1 - b1) R, v <- b2 v + (1 - b2) R^2;
    fedyogi: v <- v - (1 - b2) R^2 sign(v - R^2); fedadagrad: v <- v + R^2; u = m / (sqrt(v) +
    tau), v from tau^2 (arXiv 2003.00295, without bias correction as there). Only what is in
    `trained` has moments; the rest (running statistics) moves by R. It is `Stepped`, the step of a
    merge, in every case.
    """
    second = SERVER_OPTIMIZERS[recipe.server_optimizer]
    beta1 = recipe.server_momentum
    if beta1 is None:
        beta1 = 0.9 if second else 0.0
    if not second and not beta1:
        return replace(state, params=dict(Stepped(state.params, update, recipe.server_lr)))
    directions, m, v = dict(update), {}, {}
    for name in trained:
        R = directions[name]
        m[name] = beta1 * state.m.get(name, 0) + (1 - beta1 if second else 1) * R
        directions[name] = m[name]
        if second:
            before = state.v.get(name, torch.full_like(R, recipe.server_tau**2))
            v[name] = second(before, R.square(), recipe.server_beta2)
            directions[name] = m[name] / (v[name].sqrt() + recipe.server_tau)
    scaled = Stepped(
        state.params, directions, lambda name: recipe.server_lr if name in trained else 1.0
    )
    return replace(state, params=dict(scaled), m=m, v=v)
