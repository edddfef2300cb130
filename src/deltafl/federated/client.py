"""What a client does in a round: take the server's parameters, train on its own samples, return an update."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from deltafl.algebra.deltas import Difference, Update
from deltafl.algebra.tensors import Joined, Tensors
from deltafl.federated.recipe import FederatedRecipe
from deltafl.models.flat import FlatModel
from deltafl.models.heads import LinearHead
from deltafl.rules.rule import Source
from deltafl.seeding import keyed_generator
from deltafl.sparse.masks import Mask
from deltafl.sparse.packed import KeptIndex, PackedDelta
from deltafl.sparse.sgdm import SparseSGDM
from deltafl.tasks.arrays import Split
from deltafl.tasks.transforms import random_crop, random_flip
from deltafl.training.legacy import Batch, train_step
from deltafl.training.recipe import PRECISIONS
from deltafl.training.step import batches, keyed_dropout

HEAD = "deltafl_head."
"""Before the names of a trained head's tensors, weight and bias, among the server's parameters."""


@dataclass(frozen=True)
class Round:
    """One client's part of one round: `number` from 1, who it is, its rows of `split`, how many steps at which lr.

    control: c - c_i of scaffold, (P,) in the order of the trained parameters; None for other algorithms.
    """

    number: int
    client: int
    split: Split
    ids: Tensor
    num_steps: int
    lr: float
    control: Tensor | None = None


@dataclass(frozen=True)
class ClientUpdate(Update):
    """An update with the mean training loss, the seconds it took, and for scaffold the client's new c_i, (P,)."""

    loss: float | None = None
    seconds: float = 0.0
    control: Tensor | None = None


class Client(Protocol):
    """Local training, as a run needs it; a user's own replaces `LocalTraining`.

    `params` are the server's (name -> tensor), not to be changed. `mask` None: all coordinates train. The delta of the
    update has the names of `params`. A `module:attr` is called with (model, head, recipe) and returns one of these,
    which serves all clients.
    """

    def __call__(self, params: Tensors, mask: Mask | None, round: Round) -> Update: ...


class LocalTraining:
    """SGDM, FedProx (arXiv 1812.06127) or SCAFFOLD (arXiv 1910.06378) on one working model that all clients share.

    The model, its float buffers and a trained head are set from the server's parameters at the start of every call;
    momentum starts anew. Other buffers (counters of batches) are put back at the end: nobody's training is in them.
    """

    def __init__(self, model: FlatModel, head: LinearHead, recipe: FederatedRecipe) -> None:
        self.model, self.head, self.recipe = model, head, recipe
        self._optimiser: SparseSGDM | None = None
        self._mask: Mask | None = None

    def __call__(self, params: Tensors, mask: Mask | None, round: Round) -> ClientUpdate:
        """Train and return the update: at frozen coordinates exactly 0, and packed where a mask is given."""
        started = time.perf_counter()
        load_params(self.model, self.head, params)
        optimiser = self._ready(mask)
        trained = [self.model.flat, *self.head.parameters()]
        anchors = (
            [p.detach().clone() for p in trained] if self.recipe.local_algorithm != "sgd" else []
        )
        adjust = self._adjustment(optimiser, trained, anchors, round)
        skipping = optimiser.skip_frozen() if mask is not None else nullcontext()
        dropout = keyed_dropout(self.model.device, self.recipe.seed, round.number, round.client)
        with skipping, dropout, self._buffers_kept():
            loss = self._train(round, optimiser, adjust)
        after = self._after(params, optimiser)
        control = None
        if round.control is not None:  # c_i+ = (x - y) / (J lr) - (c - c_i), option II
            moved = torch.cat(
                [(a - p.detach()).reshape(-1) for a, p in zip(anchors, trained, strict=True)]
            )
            control = moved / (round.num_steps * round.lr) - round.control
        source = Source(
            f"client {round.client}",
            num_examples=len(round.ids),
            num_steps=round.num_steps,
            lr=round.lr,
            momentum=self.recipe.momentum,
            prox_mu=self.recipe.prox_mu if self.recipe.local_algorithm == "fedprox" else None,
        )
        delta = Difference(params, after)
        mean = (
            float(loss) / round.num_steps
        )  # reading it makes a GPU finish, so that the time is the client's
        return ClientUpdate(delta, source, mean, time.perf_counter() - started, control)

    def index(self, mask: Mask) -> KeptIndex | None:
        """Where the kept values of every update with this mask belong; None if all are kept."""
        return self._ready(mask).index

    @contextmanager
    def _buffers_kept(self) -> Iterator[None]:
        """Buffers that are not float are afterwards what they were."""
        kept = [(b, b.clone()) for b in self.model.module.buffers() if not b.is_floating_point()]
        try:
            yield
        finally:
            for buffer, value in kept:
                buffer.copy_(value)

    def _ready(self, mask: Mask | None) -> SparseSGDM:
        """The optimiser for this mask; its buffers serve one client after the other."""
        if self._optimiser is None or self._mask is not mask:
            r = self.recipe
            self._mask = mask
            self._optimiser = SparseSGDM(
                self.model, mask, r.lr, momentum=r.momentum, weight_decay=r.weight_decay, nesterov=r.nesterov,
                extra=self.head.parameters(),
            )  # fmt: skip
        self._optimiser.reset()
        return self._optimiser

    def _adjustment(
        self, optimiser: SparseSGDM, trained: list[Tensor], anchors: list[Tensor], round: Round
    ) -> Callable[[], None] | None:
        """What happens to the gradients of a step before they are clipped and used."""
        mu = self.recipe.prox_mu
        prox = self.recipe.local_algorithm == "fedprox"
        corrections: list[Tensor] = []
        if round.control is not None:
            parts = round.control.split([p.numel() for p in trained])
            corrections = [part.view(p.shape) for part, p in zip(parts, trained, strict=True)]
        clip_sparse = self.recipe.grad_clip is not None and optimiser.index is not None
        if not (prox or corrections or clip_sparse):
            return None

        def adjust() -> None:
            for i, parameter in enumerate(trained):
                assert parameter.grad is not None
                if prox:
                    parameter.grad.add_(parameter.detach() - anchors[i], alpha=mu)
                if corrections:
                    parameter.grad.add_(corrections[i])
            if clip_sparse:
                optimiser.mask_gradients_()

        return adjust

    def _train(
        self, round: Round, optimiser: SparseSGDM, adjust: Callable[[], None] | None
    ) -> Tensor:
        """Local steps on batches keyed by (seed, round, client); the sum of their losses, on the device."""
        r, purpose = self.recipe, f"round {round.number} client {round.client}"
        total = torch.zeros((), device=self.model.device)
        ids = round.ids.to(round.split.images.device)
        for step, rows in enumerate(batches(ids, r.batch_size, r.seed, round.num_steps, purpose)):
            images, labels = round.split.at(rows, self.model.device)
            if r.augment != "none":
                images = augmented(
                    images, r.augment, keyed_generator(r.seed, "augment", purpose, step)
                )
            total += train_step(
                self.model,
                self.head,
                Batch(images, labels),
                optimiser,
                lr=round.lr,
                grad_clip=r.grad_clip,
                label_smoothing=r.label_smoothing,
                autocast=PRECISIONS[r.mixed_precision],
                on_gradients=adjust,
            )
        return total

    def _after(self, params: Tensors, optimiser: SparseSGDM) -> Tensors:
        """The trained parameters, copied out of the working model; with a mask only the kept values are held."""
        own = self.model.tensors()
        flat = self.model.flat.detach()
        rest = {
            n: t.detach().clone() for n, t in moving(self.model, self.head).items() if n not in own
        }
        if optimiser.index is None:
            copy = flat.clone()
            return {
                n: copy[part].view(own[n].shape) for n, part in self.model.slices.items()
            } | rest
        shapes = {n: tuple(t.shape) for n, t in own.items()}
        packed = PackedDelta(optimiser.index.gather(flat), optimiser.index, shapes, onto=params)
        parts = (packed, rest)
        return Joined({n: (part, n) for part in parts for n in part}) if rest else packed


def augmented(images: Tensor, kind: str, generator: torch.Generator) -> Tensor:
    """uint8 (B, C, H, W), mirrored at random, and for "crop_flip" shifted by up to an eighth of the width first."""
    if kind == "crop_flip":
        images = random_crop(images, max(1, images.shape[-1] // 8), generator)
    return random_flip(images, generator)


def moving(model: FlatModel, head: LinearHead) -> dict[str, Tensor]:
    """All that a round may change: trainable parameters, float buffers, the tensors of a trainable head; no copies.

    Buffers that are not float stay the server's; a frozen head is not here.
    """
    persistent = model.module.state_dict().keys()
    buffers = {
        n: b for n, b in model.module.named_buffers() if n in persistent and b.is_floating_point()
    }
    trained = {HEAD + "weight": head.weight, HEAD + "bias": head.bias} if head.parameters() else {}
    return {**model.tensors(), **buffers, **trained}


@torch.no_grad()
def load_params(model: FlatModel, head: LinearHead, params: Mapping[str, Tensor]) -> None:
    """Set the working model, and a trained head, to the server's parameters."""
    for name, tensor in moving(model, head).items():
        tensor.copy_(params[name])
