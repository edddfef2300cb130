"""One round: the chosen clients train, their updates become one by a rule, the server steps."""

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from deltafl.algebra.aggregate import Aggregate
from deltafl.algebra.deltas import Update
from deltafl.algebra.tensors import Tensors, blocks, lazy
from deltafl.errors import DeltaflError, shorten
from deltafl.federated.client import Client, ClientUpdate, LocalTraining, names_of
from deltafl.federated.local import Round
from deltafl.federated.recipe import FederatedRecipe
from deltafl.federated.scaffold import Controls, correction, with_controls
from deltafl.federated.server import ServerState, server_step
from deltafl.forking import can_fork
from deltafl.models.net import Net
from deltafl.pool import Pool, shared_like
from deltafl.sparse.masks import Mask
from deltafl.tasks.task import Task

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Federation:
    """What stays the same from round to round.

    net: the one working net, whose values are those of whoever used it last. shards: ids of each
    client's training examples. mask None: all coordinates train.
    """

    recipe: FederatedRecipe
    net: Net
    task: Task
    shards: Sequence[Tensor]
    mask: Mask | None
    client: Client
    controls: Controls


@dataclass(frozen=True)
class RoundResult:
    """What happened in a round: who took part, whose update was not finite, the mean loss, who
    took how long.

    client_seconds are those of all clients together, also of clients that trained at the same time.
    start: what they started from. updates: the finite ones by client, valid until the next round.
    """

    start: ServerState
    updates: Mapping[int, Update]
    clients: tuple[int, ...]
    failed: tuple[int, ...]
    num_steps: int
    loss: float | None
    client_seconds: float
    server_seconds: float

    @property
    def numbers(self) -> dict[str, object]:
        """What the record keeps of it."""
        return {n: v for n, v in vars(self).items() if n not in ("start", "updates")}


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
    updates: dict[int, Update] = {}
    failed: list[int] = []
    client_seconds = 0.0
    for k, (update, seconds) in zip(chosen, workers.train(state, chosen), strict=True):
        client_seconds += seconds
        _refuse_other_tensors(update, k, state.params)
        if is_finite(update):
            updates[k] = update
        else:
            logger.warning(
                "round %d: the update of client %d has NaN or Inf and is left out", number, k
            )
            failed.append(k)
    if not updates:
        raise DeltaflError(
            f"round {number}: no client's update is finite ({len(failed)} of them); "
            "use a smaller lr"
        )
    started = time.perf_counter()
    names = names_of(federation.net)
    trained = {names[n] for n in federation.net.slices}
    total = aggregate(list(updates.values()), recipe, number)
    stepped = replace(server_step(state, total, recipe.server, trained), round=number)
    stepped = with_controls(stepped, updates, federation.controls, recipe.sharding.num_clients)
    losses = [
        u.loss for u in updates.values() if isinstance(u, ClientUpdate) and u.loss is not None
    ]
    result = RoundResult(
        state,
        updates,
        tuple(chosen),
        tuple(failed),
        sum(u.source.num_steps or 0 for u in updates.values()),
        sum(losses) / len(losses) if losses else None,
        client_seconds,
        time.perf_counter() - started,
    )
    return stepped, result


class Workers(AbstractContextManager["Workers"]):
    """Processes that train the clients of a round, to the same bits as in this one, where `count`
    is 1.

    The server's parameters, and c of scaffold, go to all of them through shared memory, written
    once a round.
    """

    def __init__(self, federation: Federation, state: ServerState, count: int = 1) -> None:
        self._federation, self._params, self._control = federation, state.params, state.control
        known: list[object] = []
        if count > 1:
            self._params = shared_like(state.params)
            if state.control is not None:
                self._control = shared_like({"": state.control})[""]
            known.append(self._params)
            if isinstance(federation.client, LocalTraining) and federation.mask is not None:
                known.append(federation.client.index(federation.mask))
        self._shared = count > 1
        self._pool = Pool(
            self._work,
            count,
            slots=federation.recipe.clients_per_round,
            like=[*state.params.values(), *([] if state.control is None else [state.control])],
            known=known,
        )

    def train(self, state: ServerState, clients: Sequence[int]) -> Iterator[tuple[Update, float]]:
        """The update of each client and the seconds that it took, in order; valid until the next
        call.
        """
        if self._shared:
            for name, tensor in state.params.items():
                self._params[name].copy_(tensor)
            if self._control is not None and state.control is not None:
                self._control.copy_(state.control)
        else:
            self._params, self._control = state.params, state.control
        jobs = [(state.round + 1, k, state.control_rounds.get(k)) for k in clients]
        return self._pool.map(jobs)

    @property
    def memory(self) -> int:
        """Bytes that the processes have needed at most, beside what they share with this one."""
        return sum(self._pool.memory.values())

    def _work(self, job: tuple[int, int, int | None]) -> tuple[Update, float]:
        number, k, own = job
        fed, recipe, control = self._federation, self._federation.recipe, self._control
        started = time.perf_counter()
        if control is not None:
            control = correction(fed.controls, control, k, own)
        part = Round(number, k, fed.shards[k], recipe.steps_of(k), recipe.lr_in(number), control)
        update = fed.client(self._params, fed.mask, part)
        took = update.seconds if isinstance(update, ClientUpdate) else time.perf_counter() - started
        return update, took

    def __exit__(self, *exception: object) -> None:
        self._pool.close()


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


def aggregate(updates: Sequence[Update], recipe: FederatedRecipe, number: int) -> Aggregate:
    """R of the updates, weighed by examples where the recipe says so and the rule does not do it
    itself.
    """
    sizes = [u.source.num_examples for u in updates]
    rule = recipe.server.rule(recipe.seed + number)
    by_size = recipe.server.client_weights == "examples" and not rule.core.weighs_examples
    weigh = by_size and len(set(sizes)) > 1
    return Aggregate(rule, updates, [float(n or 0) for n in sizes] if weigh else None)


def is_finite(update: Update) -> bool:
    """Whether no element of the delta is NaN or Inf."""
    delta = lazy(update.delta)
    for name in delta:
        for start, stop in blocks(delta.spec(name).numel):
            block = delta.block(name, start, stop)
            if not torch.isfinite(block.sum()) and not torch.isfinite(block).all():
                return False
    return True


def _refuse_other_tensors(update: Update, client: int, params: Mapping[str, Tensor]) -> None:
    """Raise DeltaflError unless the delta has the tensors of the parameters: a user's own client
    may err.
    """
    delta: Tensors = update.delta
    odd = sorted(delta.keys() ^ params.keys())
    odd = odd or [n for n in params if lazy(delta).spec(n).shape != params[n].shape]
    if odd:
        raise DeltaflError(
            f"the update of client {client} has not the tensors of the model, or other shapes: "
            f"{shorten(odd)}; a delta holds every name of the parameters that the client was given"
        )
