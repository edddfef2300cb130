"""Clients: take the server's parameters, train on their own examples, return an update."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn

from deltafl.algebra.deltas import Difference, Update
from deltafl.algebra.tensors import Joined, Tensors
from deltafl.federated.local import Round
from deltafl.federated.recipe import FederatedRecipe
from deltafl.models.net import Net
from deltafl.seeding import keyed_generator
from deltafl.sparse.masks import Mask
from deltafl.sparse.packed import PackedDelta, kept_index
from deltafl.sparse.sgdm import SparseSGDM
from deltafl.tasks.task import Task
from deltafl.training.step import batches, keyed_dropout, train_step


@dataclass(frozen=True)
class ClientUpdate(Update):
    """An update with the mean training loss, and for scaffold the client's new c_i, (k,)."""

    loss: float | None = None
    control: Tensor | None = None


Client: TypeAlias = Callable[[Tensors, Mask | None, Round], Update]
"""Local training, as a run needs it: (params, mask, round) -> update; a user's own replaces
`LocalTraining`.

params: the server's (name -> tensor), not to be changed. mask None: all coordinates train. The
delta of the update has the names of `params`. A `module:attr` is called with (net, task, recipe)
and returns one of these, which serves all clients.
"""


class LocalTraining:
    """Local SGDM, changed by the recipe's `local_algorithm`, on one working net that all clients
    share.

    The net is set to the server's parameters at the start of every call; momentum starts anew.
    Buffers that are not float (counters of batches) are put back at the end: nobody's training is
    in them. Gradients of tensors of which the mask keeps nothing are not computed.
    """

    def __init__(self, net: Net, task: Task, recipe: FederatedRecipe) -> None:
        self.net, self.task, self.recipe = net, task, recipe
        self._state = state_of(net)
        shapes = [(n, tuple(t.shape)) for n, t in self._state.items()]
        self._shapes = dict(shapes[: len(net.slices)])
        buffers = [b for b in net.module.buffers() if not b.is_floating_point()]
        self._counters = [(b, b.clone()) for b in buffers]
        self._index: Tensor | None = None
        self._mask: Mask | None = None
        self._idle: list[nn.Parameter] = []

    @torch.no_grad()
    def __call__(self, params: Tensors, mask: Mask | None, round: Round) -> ClientUpdate:
        """Train and return the update: at frozen coordinates exactly 0, and packed where a mask is
        given.
        """
        net, seed, local = self.net, self.recipe.seed, self.recipe.local
        load_state(self._state, params)
        index = self.index(mask)
        optimiser = SparseSGDM(
            net.flat,
            index,
            local.lr,
            local.momentum,
            weight_decay=local.weight_decay,
            nesterov=local.nesterov,
        )
        kept = optimiser.kept
        before = kept if index is None else kept.detach().clone()
        algorithm = local.algorithm(kept, local, round)

        def adjust() -> None:
            optimiser.gather()
            assert kept.grad is not None
            algorithm.adjust(kept.grad)
            if local.grad_clip is not None:
                nn.utils.clip_grad_norm_([kept], local.grad_clip)

        purpose = f"round {round.number} client {round.client}"
        lengths = self.task.lengths("train")
        size, steps = local.batch_size, round.num_steps
        rows = batches(round.ids, size, seed, steps, purpose, lengths=lengths)
        drawn, device = keyed_generator(seed, "augment", purpose), net.device
        loss = torch.zeros((), device=device)
        dropout = keyed_dropout(device, seed, round.number, round.client)
        with self._frozen(), dropout, torch.enable_grad():
            for ids in rows:
                loss += train_step(
                    net,
                    self.task,
                    self.task.batch("train", ids, device, drawn),
                    optimiser,
                    lr=round.lr,
                    autocast=self.recipe.autocast,
                    micro=local.micro_batch_size,
                    on_gradients=adjust,
                )
        for buffer, value in self._counters:
            buffer.copy_(value)
        source = local.source(f"client {round.client}", len(round.ids), round.num_steps, round.lr)
        if index is None:
            delta = Difference(params, {n: t.clone() for n, t in self._state.items()})
        else:
            packed = PackedDelta(kept.float() - before, index, self._shapes)
            rest = {n: t.clone() for n, t in self._state.items() if n not in packed}
            parts = packed, Difference(params, rest)
            delta = Joined({n: (part, n) for part in parts for n in part}) if rest else packed
        return ClientUpdate(delta, source, float(loss) / round.num_steps, algorithm.control())

    def index(self, mask: Mask | None) -> Tensor | None:
        """Where the kept values of every update with this mask belong; None if all are kept."""
        if self._mask is not mask:
            self._mask, self._index, held = mask, None, mask or {}
            self._idle = [self.net.module.get_parameter(n) for n, m in held.items() if not m.any()]
            if mask is not None and not all(kept.all() for kept in mask.values()):
                self._index = kept_index(mask, self.net.slices, self.net.device)
        return self._index

    @contextmanager
    def _frozen(self) -> Iterator[None]:
        """Tensors of which the mask keeps nothing get no gradients within the block."""
        try:
            for parameter in self._idle:
                parameter.requires_grad_(False)
            yield
        finally:
            for parameter in self._idle:
                parameter.requires_grad_(True)


def state_of(net: Net) -> dict[str, Tensor]:
    """`net.state()`, all that a round may change, by the names of the server's parameters; no
    copies.

    A name is that in the model's files, so that rules draw as they do when files are merged; the
    module's own where this is another tensor's.
    """
    state = net.state()
    files = {n: net.file_name(n) for n in state}
    return {n if f != n and f in state else f: state[n] for n, f in files.items()}


@torch.no_grad()
def load_state(state: Mapping[str, Tensor], params: Mapping[str, Tensor]) -> None:
    """Set the `state_of` a working net to the server's parameters."""
    for name, tensor in state.items():
        tensor.copy_(params[name])
