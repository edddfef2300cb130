"""One round: the chosen clients train, their updates become one by a rule, the server steps."""

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import Tensor

from deltafl.algebra.aggregate import Aggregate
from deltafl.algebra.deltas import Deltas, Update
from deltafl.errors import DeltaflError
from deltafl.federated.client import ClientUpdate, LocalTraining
from deltafl.federated.local import Round
from deltafl.federated.lora import as_products, lora_step, naive_error
from deltafl.federated.recipe import FederatedRecipe
from deltafl.federated.server import ServerState, server_step
from deltafl.federated.setup import Federation
from deltafl.forking import can_fork
from deltafl.pool import Pool, shared_like
from deltafl.rules.rule import Source
from deltafl.training.record import Row

logger = logging.getLogger(__name__)


Job: TypeAlias = tuple[int, int]
"""Number of the round, and client."""

Trained: TypeAlias = tuple[ClientUpdate, bool, float]
"""An update, whether it is finite, and the seconds that it took."""


@dataclass(frozen=True)
class RoundResult:
    """What happened in a round.

    updates: the finite ones by client, valid until the next round. numbers: what the record keeps
    of it; client_seconds are those of all clients together, also of clients that trained at the
    same time.
    """

    updates: Mapping[int, Update]
    numbers: Row


def run_round(
    state: ServerState, federation: Federation, workers: "Workers"
) -> tuple[ServerState, RoundResult]:
    """Round `state.round + 1`. An update with NaN or Inf is left out, counted, and its client
    named.

    Raises:
        DeltaflError: no finite update is left, or the rule refuses (krum with too few clients).
    """
    recipe, number = federation.recipe, state.round + 1
    chosen = recipe.clients_in(number)
    updates, failed, client_seconds = dict[int, ClientUpdate](), list[int](), 0.0
    for k, (update, finite, took) in zip(chosen, workers.train(state, chosen), strict=True):
        client_seconds += took
        if recipe.local.client is not None:
            told = Update(state.params, Source("the server"))
            Deltas([told, Update(update.delta, Source(f"client {k}"))], {})
        if finite:
            updates[k] = update
        else:
            failed.append(k)
            logger.warning(
                "round %d: the update of client %d has NaN or Inf and is left out", number, k
            )
    if not updates:
        raise DeltaflError(
            f"round {number}: no client's update is finite ({len(failed)} of them); "
            "use a smaller lr"
        )
    started = time.perf_counter()
    given, lost = list[Update](updates.values()), Row()
    if loras := federation.loras:
        total = combined([as_products(loras, state.params, u) for u in given], recipe, state)
        stepped, lost = lora_step(state, total, recipe.server, federation.trained, loras)
        lost["naive_lora_error"] = naive_error(loras, state.params, total, given)
    else:
        total = combined(given, recipe, state)
        stepped = server_step(state, total, recipe.server, federation.trained)
    stepped = replace(stepped, round=number)
    stepped = federation.controls.step(stepped, updates, recipe.sharding.num_clients)
    losses = [u.loss for u in updates.values() if u.loss is not None]
    numbers = {
        "clients": chosen,
        "failed": failed,
        "num_steps": sum(u.source.num_steps or 0 for u in updates.values()),
        "loss": sum(losses) / len(losses) if losses else None,
        "client_seconds": client_seconds,
        "server_seconds": time.perf_counter() - started,
        **lost,
    }
    return stepped, RoundResult(updates, numbers)


class Workers(Pool[Job, Trained]):
    """Processes that train the clients of a round, to the same bits as in this one, where `count`
    is 1.

    The server's parameters, and c of scaffold, go to all of them through shared memory, written
    once a round.
    """

    def __init__(self, federation: Federation, state: ServerState, count: int = 1) -> None:
        self._federation, self._state, self._shared = federation, state, count > 1
        client, known = federation.client, list[object]()
        if self._shared:
            copies = shared_like(_told(state))
            self._state = replace(state, control=copies.pop(CONTROL, None), params=copies)
            known.append(copies)
            if isinstance(client, LocalTraining):
                known.append(client.index(federation.mask))
        super().__init__(
            self._train,
            count,
            slots=federation.recipe.clients_per_round,
            like=[t for n, t in _told(state).items() if n not in federation.net.moved],
            known=known,
        )

    def train(self, state: ServerState, clients: Sequence[int]) -> Iterator[Trained]:
        """What each client has done, in order; valid until the next call."""
        if self._shared:
            held = _told(self._state)
            for name, tensor in _told(state).items():
                held[name].copy_(tensor)
        else:
            self._state = state
        return self.map((state.round + 1, k) for k in clients)

    def _train(self, job: Job) -> Trained:
        number, k = job
        fed, recipe, state = self._federation, self._federation.recipe, self._state
        started, control = time.perf_counter(), state.control
        if control is not None:
            control = control - fed.controls.read(k, number, control)
        part = Round(number, k, fed.shards[k], recipe.steps_of(k), recipe.lr_in(number), control)
        update = fed.client(state.params, fed.mask, part)
        if not isinstance(update, ClientUpdate):
            update = ClientUpdate(update.delta, update.source)
        return update, is_finite(update), time.perf_counter() - started


CONTROL = "c of scaffold"


def _told(state: ServerState) -> dict[str, Tensor]:
    """What clients are told: the server's parameters, and c."""
    return {**state.params, **({} if state.control is None else {CONTROL: state.control})}


def count_workers(recipe: FederatedRecipe, device: torch.device) -> int:
    """How many processes train the clients of a round: at most one for each client.

    By default as many as torch has threads, where that is possible; 1 for a user's own client, who
    may remember things.

    Raises:
        DeltaflError: several where processes cannot be forked for training.
    """
    asked = recipe.workers
    reasons = {
        f"they are for CPUs, and the device is {device}": device.type != "cpu",
        "they need Linux, and no other thread in this process": not can_fork(),
        "torch does not train in forked processes where there is a GPU": torch.cuda.is_available(),
    }
    reason = next((text for text, holds in reasons.items() if holds), None)
    if asked is None:
        asked = 1 if reason or recipe.local.client is not None else torch.get_num_threads()
    if asked > 1 and reason:
        raise DeltaflError(f"no {asked} workers here: {reason}; use workers 1")
    return min(asked, recipe.clients_per_round)


def combined(updates: Sequence[Update], recipe: FederatedRecipe, state: ServerState) -> Aggregate:
    """R of the next round's updates, weighed by examples where the recipe says so and the rule does
    not do it itself.
    """
    sizes = [u.source.num_examples for u in updates]
    rule = recipe.server.rule(recipe.seed + state.round + 1)
    by_size = recipe.server.client_weights == "examples" and not rule.core.weighs_examples
    weigh = by_size and len(set(sizes)) > 1
    weights = [float(n or 0) for n in sizes] if weigh else None
    return Aggregate(rule, updates, weights, base=state.params)


def is_finite(update: Update) -> bool:
    """Whether no element of the delta is NaN or Inf."""
    return all(t.sum(dtype=torch.float64).isfinite() for t in update.delta.values())
