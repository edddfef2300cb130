"""One round: the chosen clients train, their updates become one by a rule, the server steps."""

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from deltafl.algebra.aggregate import Aggregate
from deltafl.algebra.deltas import Update
from deltafl.algebra.tensors import Tensors, blocks, lazy
from deltafl.errors import DeltaflError, shorten
from deltafl.federated.client import Client, ClientUpdate, LocalTraining, Round
from deltafl.federated.controls import Controls
from deltafl.federated.recipe import FederatedRecipe
from deltafl.federated.server import ServerState, choose_clients, round_lr, server_step, steps_of
from deltafl.federated.workers import Workers, one_thread
from deltafl.sparse.masks import Mask
from deltafl.tasks.arrays import Split

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RoundResult:
    """What happened in a round: who took part, whose update was not finite, the mean loss, who took how long.

    client_seconds are those of all clients together, also of clients that trained at the same time. worker_bytes: what
    the workers have needed at most, beside what they share with this process.
    """

    clients: tuple[int, ...]
    failed: tuple[int, ...]
    num_steps: int
    loss: float | None
    client_seconds: float
    server_seconds: float
    worker_bytes: int = 0


@dataclass(frozen=True)
class World:
    """What stays the same from round to round: data, shards, who trains, what may move.

    workers: processes in which the clients train; None: in this one. The results are the same bits.
    """

    recipe: FederatedRecipe
    split: Split
    shards: Sequence[Tensor]
    client: Client
    mask: Mask | None
    trained: frozenset[str]
    controls: Controls
    workers: Workers | None = None


OnUpdate = Callable[[int, Update], None]
"""Told of each finite update and its client, before the server's step."""


def run_round(
    state: ServerState, world: World, on_update: OnUpdate = lambda client, update: None
) -> tuple[ServerState, RoundResult]:
    """Round `state.round + 1`. An update with NaN or Inf is left out, counted, and its client named.

    Raises:
        DeltaflError: no finite update is left, or the rule refuses (krum with too few clients).
    """
    recipe, number = world.recipe, state.round + 1
    chosen = choose_clients(recipe, number)
    updates: list[tuple[int, Update, Tensor | None]] = []
    failed: list[int] = []
    client_seconds = 0.0
    for k, own, update, seconds in _trained(state, world, chosen):
        client_seconds += seconds
        _refuse_other_tensors(update, k, state.params)
        if finite(update):
            updates.append((k, update, own))
            on_update(k, update)
        else:
            logger.warning(
                "round %d: the update of client %d has NaN or Inf and is left out", number, k
            )
            failed.append(k)
    if not updates:
        raise DeltaflError(
            f"round {number}: no client's update is finite ({len(failed)} of them); use a smaller lr"
        )
    started = time.perf_counter()
    stepped = server_step(
        state, aggregate([u for _, u, _ in updates], recipe, number), recipe, set(world.trained)
    )
    stepped = _with_controls(replace(stepped, round=number), updates, world)
    losses = [u.loss for _, u, _ in updates if isinstance(u, ClientUpdate) and u.loss is not None]
    result = RoundResult(
        tuple(chosen),
        tuple(failed),
        sum(u.source.num_steps or 0 for _, u, _ in updates),
        sum(losses) / len(losses) if losses else None,
        client_seconds,
        time.perf_counter() - started,
        0 if world.workers is None else sum(world.workers.memory.values()),
    )
    return stepped, result


def _trained(
    state: ServerState, world: World, chosen: Sequence[int]
) -> Iterator[tuple[int, Tensor | None, Update, float]]:
    """Each chosen client, its own control variate, its update and the seconds that it took, in the order of `chosen`:
    trained one after the other, or several at a time.
    """
    number = state.round + 1
    owns = (_own_control(world, state.control, k, state.control_rounds) for k in chosen)
    if world.workers is not None:
        for k, own, (update, seconds) in zip(
            chosen, owns, world.workers.train(state, chosen), strict=True
        ):
            yield k, own, update, seconds
    else:
        for k, own in zip(chosen, owns, strict=True):
            yield k, own, *_train(world, state.params, _part(world, number, k, state.control, own))


@contextmanager
def in_workers(world: World, state: ServerState, count: int) -> Iterator[World]:
    """The same world, whose clients train in `count` processes while the block lasts; with 1 in this one."""
    if count == 1:
        yield world
        return
    client, known = world.client, list[object]()
    if isinstance(client, LocalTraining) and world.mask is not None:
        known.append(client.index(world.mask))  # one object for all updates, as in one process

    def train(
        params: Tensors, control: Tensor | None, number: int, k: int, own_round: int
    ) -> tuple[Update, float]:
        own = _own_control(world, control, k, {} if own_round < 0 else {k: own_round})
        return _train(world, params, _part(world, number, k, control, own))

    workers = Workers(count, train, state, world.recipe.clients_per_round, known)
    try:
        yield replace(world, workers=workers)
    finally:
        workers.close()


def _train(world: World, params: Tensors, part: Round) -> tuple[Update, float]:
    """One client's update and the seconds that it took."""
    started = time.perf_counter()
    with one_thread(part.split.images.device):
        update = world.client(params, world.mask, part)
    return update, update.seconds if isinstance(
        update, ClientUpdate
    ) else time.perf_counter() - started


def _part(world: World, number: int, k: int, control: Tensor | None, own: Tensor | None) -> Round:
    """What client k is given in round `number`: of scaffold c - c_i, where `own` None is c_i = 0."""
    rest = control if own is None or control is None else control - own
    steps, lr = steps_of(world.recipe, k), round_lr(world.recipe, number)
    return Round(number, k, world.split, world.shards[k], steps, lr, rest)


def _own_control(
    world: World, control: Tensor | None, client: int, rounds: Mapping[int, int]
) -> Tensor | None:
    """c_i where the server's c is; None without scaffold and for a client that never took part."""
    own = None if control is None else world.controls.read(client, rounds)
    return None if own is None or control is None else own.to(control.device)


def _refuse_other_tensors(update: Update, client: int, params: Tensors) -> None:
    """Raise DeltaflError unless the delta has the tensors of the parameters: a user's own client may err."""
    odd = sorted(update.delta.keys() ^ params.keys())
    delta, ours = lazy(update.delta), lazy(params)
    odd = odd or [n for n in params if delta.spec(n).shape != ours.spec(n).shape]
    if odd:
        raise DeltaflError(
            f"the update of client {client} has not the tensors of the model, or other shapes: {shorten(odd)}; "
            "a delta holds every name of the parameters that the client was given"
        )


def aggregate(updates: Sequence[Update], recipe: FederatedRecipe, number: int = 0) -> Aggregate:
    """R of the updates, weighed by examples where the recipe says so and the rule (fedavg) does not do it itself."""
    sizes = [u.source.num_examples for u in updates]
    rule = recipe.rule(number)
    by_size = recipe.client_weights == "examples" and not rule.core.weighs_examples
    weigh = by_size and len(set(sizes)) > 1
    return Aggregate(rule, updates, [float(n or 0) for n in sizes] if weigh else None)


def finite(update: Update) -> bool:
    """Whether no element of the delta is NaN or Inf."""
    delta = lazy(update.delta)
    for name in delta:
        for start, stop in blocks(delta.spec(name).numel):
            block = delta.block(name, start, stop)
            if not torch.isfinite(block.sum()) and not torch.isfinite(block).all():
                return False
    return True


def _with_controls(
    state: ServerState, updates: Sequence[tuple[int, Update, Tensor | None]], world: World
) -> ServerState:
    """SCAFFOLD: c <- c + sum_i (c_i+ - c_i) / K, and every c_i+ kept for its client's next round."""
    control, rounds = state.control, dict(state.control_rounds)
    if control is None:
        return state
    for k, update, own in updates:
        new = update.control if isinstance(update, ClientUpdate) else None
        if new is None:
            raise DeltaflError(
                "scaffold needs clients that return their new control; this one's updates have none"
            )
        control = control + (new if own is None else new - own) / world.recipe.num_clients
        world.controls.write(k, state.round, new)
        rounds[k] = state.round
    return replace(state, control=control, control_rounds=rounds)
