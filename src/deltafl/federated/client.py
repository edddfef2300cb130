"""Clients: take the server's parameters, train on their own examples, return an update."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from deltafl.algebra.deltas import Difference, Update
from deltafl.algebra.tensors import Joined, Tensors
from deltafl.federated.local import Round, Sgd
from deltafl.federated.recipe import FederatedRecipe
from deltafl.models.net import Net
from deltafl.seeding import keyed_generator
from deltafl.sparse.masks import Mask
from deltafl.sparse.packed import PackedDelta, kept_index
from deltafl.sparse.sgdm import SparseSGDM, frozen_tensors
from deltafl.tasks.task import Task
from deltafl.training.recipe import PRECISIONS
from deltafl.training.step import batches, keyed_dropout, train_step


@dataclass(frozen=True)
class ClientUpdate(Update):
    """An update with the mean training loss, the seconds it took, and for scaffold the client's new
    c_i, (P,).
    """

    loss: float | None = None
    seconds: float = 0.0
    control: Tensor | None = None


class Client(Protocol):
    """Local training, as a run needs it; a user's own replaces `LocalTraining`.

    `params` are the server's (name -> tensor), not to be changed. `mask` None: all coordinates
    train. The delta of the update has the names of `params`. A `module:attr` is called with (net,
    task, recipe) and returns one of these, which serves all clients.
    """

    def __call__(self, params: Tensors, mask: Mask | None, round: Round) -> Update: ...


class LocalTraining:
    """Local SGDM, changed by the recipe's `local_algorithm`, on one working net that all clients
    share.

    The net is set to the server's parameters at the start of every call; momentum starts anew.
    Buffers that are not float (counters of batches) are put back at the end: nobody's training is
    in them.
    """

    def __init__(self, net: Net, task: Task, recipe: FederatedRecipe) -> None:
        self.net, self.task, self.recipe = net, task, recipe
        self._names = names_of(net)
        self._index: Tensor | None = None
        self._mask: Mask | None = None

    def __call__(self, params: Tensors, mask: Mask | None, round: Round) -> ClientUpdate:
        """Train and return the update: at frozen coordinates exactly 0, and packed where a mask is
        given.
        """
        started = time.perf_counter()
        load_state(self.net, params)
        local, net = self.recipe.local, self.net
        index = None if mask is None else self.index(mask)
        before = None if index is None else net.flat.detach().index_select(0, index)
        algorithm = local.algorithm(net.flat, local, round)
        optimiser = SparseSGDM(
            net.flat,
            index,
            local.lr,
            local.momentum,
            weight_decay=local.weight_decay,
            nesterov=local.nesterov,
        )
        dropout = keyed_dropout(net.device, self.recipe.seed, round.number, round.client)
        with frozen_tensors(net.module, mask or {}), dropout, _counters_kept(net.module):
            loss = self._train(round, optimiser, algorithm)
        control = algorithm.control()
        delta = self._delta(params, index, before)
        source = local.source(f"client {round.client}", len(round.ids), round.num_steps, round.lr)
        mean = float(loss) / round.num_steps  # a GPU finishes: the time is then the client's
        return ClientUpdate(delta, source, mean, time.perf_counter() - started, control)

    def index(self, mask: Mask) -> Tensor | None:
        """Where the kept values of every update with this mask belong; None if all are kept."""
        if self._mask is not mask:
            self._mask = mask
            index = kept_index(mask, self.net.slices, self.net.device)
            self._index = index if len(index) < len(self.net.flat) else None
        return self._index

    def _train(self, round: Round, optimiser: SparseSGDM, algorithm: Sgd) -> Tensor:
        """Local steps on batches keyed by (seed, round, client); the sum of their losses, on the
        device.
        """
        r, net = self.recipe, self.net
        purpose = f"round {round.number} client {round.client}"
        total = torch.zeros((), device=net.device)

        def adjust() -> None:
            assert net.flat.grad is not None
            algorithm.adjust(net.flat.grad)
            if r.local.grad_clip is not None:
                optimiser.mask_gradients_()

        rows = batches(round.ids, r.local.batch_size, r.seed, round.num_steps, purpose)
        for step, ids in enumerate(rows):
            drawn = keyed_generator(r.seed, "augment", purpose, step)
            total += train_step(
                net,
                self.task,
                self.task.batch("train", ids, net.device, drawn),
                optimiser,
                lr=round.lr,
                grad_clip=r.local.grad_clip,
                autocast=PRECISIONS[r.mixed_precision],
                on_gradients=adjust,
            )
        return total

    def _delta(self, params: Tensors, index: Tensor | None, before: Tensor | None) -> Tensors:
        """What was trained, less `params`; with a mask only the kept values are held."""
        flat, state = self.net.flat.detach(), state_of(self.net)
        trained = {self._names[n]: part for n, part in self.net.slices.items()}
        buffers = {n: t.clone() for n, t in state.items() if n not in trained}
        if index is None or before is None:
            copy = flat.clone()
            after = {n: copy[part].view_as(state[n]) for n, part in trained.items()}
            return Difference(params, after | buffers)
        moved = flat.index_select(0, index).float().sub_(before)
        packed = PackedDelta(moved, index, {n: tuple(state[n].shape) for n in trained})
        rest = Difference({n: params[n] for n in buffers}, buffers)
        return Joined({n: (part, n) for part in (packed, rest) for n in part}) if rest else packed


@contextmanager
def _counters_kept(module: nn.Module) -> Iterator[None]:
    """Buffers that are not float are afterwards what they were."""
    kept = [(b, b.clone()) for b in module.buffers() if not b.is_floating_point()]
    try:
        yield
    finally:
        for buffer, value in kept:
            buffer.copy_(value)


def names_of(net: Net) -> dict[str, str]:
    """Name in the module -> name among the server's parameters, of all that a round may change.

    That is the name in the model's files, so that rules draw as they do when files are merged; the
    module's own where this is another tensor's.
    """
    state = net.state()
    files = {name: net.file_name(name) for name in state}
    return {n: n if file != n and file in state else file for n, file in files.items()}


def state_of(net: Net) -> dict[str, Tensor]:
    """`net.state()`, all that a round may change, by the names of `names_of`; no copies."""
    names = names_of(net)
    return {names[n]: t.detach() for n, t in net.state().items()}


@torch.no_grad()
def load_state(net: Net, params: Mapping[str, Tensor]) -> None:
    """Set the working net to the server's parameters."""
    for name, tensor in state_of(net).items():
        tensor.copy_(params[name])
