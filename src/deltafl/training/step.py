"""One local step, used by fine-tuning, centralised training and federated clients, and one evaluation loop."""

import hashlib
import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from deltafl.errors import DeltaflError, did_you_mean
from deltafl.models.flat import FlatModel
from deltafl.models.heads import LinearHead
from deltafl.tasks.task import Split

SCHEDULES = ("cosine", "constant", "linear", "step")


def keyed_generator(*key: int | str) -> torch.Generator:
    """A CPU generator for one purpose: keys that differ anywhere give independent streams, equal keys the same one."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))


def batch_ids(
    num_examples: int, batch_size: int, seed: int, step: int, purpose: str = "train"
) -> Tensor:
    """int64 positions of the batch at `step` (from 0): epoch e = step // ceil(N / B) is a permutation keyed by
    (seed, purpose, e), cut into batches, the last one shorter. A function of the step alone, so resuming needs no
    generator state.
    """
    per_epoch = math.ceil(num_examples / batch_size)
    epoch, position = divmod(step, per_epoch)
    order = torch.randperm(num_examples, generator=keyed_generator(seed, purpose, epoch))
    return order[position * batch_size : (position + 1) * batch_size]


def batches(
    ids: Tensor, batch_size: int, seed: int, steps: int, purpose: str = "train"
) -> Iterator[Tensor]:
    """`ids[batch_ids(len(ids), batch_size, seed, step, purpose)]` of steps 0 .. steps - 1; one draw for each epoch."""
    per_epoch = math.ceil(len(ids) / batch_size)
    for epoch in range(math.ceil(steps / per_epoch)):
        order = torch.randperm(len(ids), generator=keyed_generator(seed, purpose, epoch)).to(
            ids.device
        )
        yield from ids[order].split(batch_size)[: steps - epoch * per_epoch]


def default_warmup(total: int) -> int:
    """min(500, 10 % of the steps)."""
    return min(500, total // 10)


def lr_at(step: int, total: int, warmup: int, base_lr: float, schedule: str = "cosine") -> float:
    """Learning rate of step 0 .. total - 1: base_lr (step + 1) / warmup during warm-up, then, with
    t = (step - warmup) / (total - warmup), base_lr times

        cosine      (1 + cos(pi t)) / 2   (arXiv 1608.03983, without restarts)
        constant    1
        linear      1 - t
        step        1 for t < 1/2, 0.1 for t < 3/4, then 0.01   (arXiv 1512.03385, section 4.2)

    Raises:
        DeltaflError: unknown schedule.
    """
    if schedule not in SCHEDULES:
        raise DeltaflError(f'unknown schedule "{schedule}"; {did_you_mean(schedule, SCHEDULES)}')
    if step < warmup:
        return base_lr * (step + 1) / warmup
    done, span = step - warmup, max(1, total - warmup)
    if schedule == "constant":
        return base_lr
    if schedule == "linear":
        return base_lr * (1 - done / span)
    if schedule == "step":
        return base_lr * 0.1 ** ((2 * done >= span) + (4 * done >= 3 * span))
    return base_lr * 0.5 * (1 + math.cos(math.pi * done / span))


@dataclass(frozen=True)
class Batch:
    """uint8 images (B, C, H, W) and int64 labels (B,) on the model's device.

    `total` is the size of the batch that this is a part of, where several processes share one; None: this is all.
    """

    images: Tensor
    labels: Tensor
    total: int | None = None


def train_step(
    model: FlatModel,
    head: LinearHead,
    batch: Batch,
    optimiser: torch.optim.Optimizer,
    *,
    lr: float,
    grad_clip: float | None = 1.0,
    label_smoothing: float = 0.0,
    autocast: torch.dtype | None = None,
    reduce: Callable[[Tensor], Tensor] | None = None,
    on_gradients: Callable[[], None] | None = None,
) -> Tensor:
    """One optimiser step on the mean cross-entropy of the batch; the module is left in training mode.

    loss = sum_i CE(head(features_i), label_i) / total; the gradient's 2-norm over all trained tensors is scaled down to
    `grad_clip`. `optimiser` holds `model.flat` and, for a trainable head, `head.parameters()`. `reduce` sums a tensor
    over processes: one call for the whole encoder. `on_gradients` may change the gradients before they are clipped.
    Returns the loss, a detached float32 scalar on the device.
    """
    trained = [model.flat, *head.parameters()]
    for parameter in trained:
        if parameter.grad is not None:
            parameter.grad.zero_()
        else:
            parameter.grad = torch.zeros_like(parameter)
    if not model.module.training:
        model.module.train()
    if len(batch.labels):
        with nullcontext() if autocast is None else torch.autocast(model.device.type, autocast):
            logits = head.logits(model.features(batch.images)).float()
        loss = nn.functional.cross_entropy(logits, batch.labels, label_smoothing=label_smoothing)
        if batch.total is not None:
            loss = loss * (len(batch.labels) / batch.total)
        loss.backward()
        loss = loss.detach()
    else:
        loss = torch.zeros((), device=model.device)
    if reduce is not None:
        for parameter in trained:
            assert parameter.grad is not None
            parameter.grad.copy_(reduce(parameter.grad))
        loss = reduce(loss)
    if on_gradients is not None:
        on_gradients()
    if grad_clip is not None:
        nn.utils.clip_grad_norm_(trained, grad_clip)
    for group in optimiser.param_groups:
        group["lr"] = lr
    optimiser.step()
    return loss


def _features_in_batches(
    model: FlatModel,
    split: Split,
    ids: Tensor | None,
    batch_size: int,
    autocast: torch.dtype | None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """(features float32, labels) of the chosen examples in order, in eval mode and without gradients."""
    chosen = torch.arange(len(split)) if ids is None else ids.cpu()
    was_training = model.module.training
    model.module.eval()
    try:
        for part in chosen.split(batch_size) if len(chosen) else ():
            images, labels = split.at(part, model.device)
            with (
                torch.inference_mode(),
                torch.autocast(model.device.type, autocast, enabled=autocast is not None),
            ):
                features = model.features(images).float()
            yield features, labels
    finally:
        model.module.train(was_training)


def extract_features(
    model: FlatModel,
    split: Split,
    ids: Tensor | None = None,
    batch_size: int = 256,
    autocast: torch.dtype | None = None,
) -> Tensor:
    """Features float32 (n, D), on the model's device, of all examples or of those at `ids`, in that order."""
    parts = [f for f, _ in _features_in_batches(model, split, ids, batch_size, autocast)]
    return (
        torch.cat(parts)
        if parts
        else torch.empty(0, model.encoder.feature_dim, device=model.device)
    )


def predict_correct(
    model: FlatModel,
    head: LinearHead,
    split: Split,
    ids: Tensor | None = None,
    batch_size: int = 256,
    autocast: torch.dtype | None = None,
) -> Tensor:
    """Per example 1 where the largest logit is the label's, else 0; uint8 (n,) on the CPU, in the order of `ids`."""
    head = head.frozen().to(model.device)
    parts = [
        (head.logits(features).argmax(1) == labels).to(torch.uint8)
        for features, labels in _features_in_batches(model, split, ids, batch_size, autocast)
    ]
    return torch.cat(parts).cpu() if parts else torch.empty(0, dtype=torch.uint8)


class Scorer(Protocol):
    """Judges a model example by example: all that search, racing and paired statistics need to know of a task."""

    def __len__(self) -> int:
        """Number of examples; ids run from 0 to it."""
        ...

    def __call__(self, model: FlatModel, ids: Tensor) -> Tensor:
        """One score per id, (n,), larger is better; a task's score is their mean over examples."""
        ...


@dataclass(frozen=True)
class Accuracy:
    """The scorer of a classification task: 1 for a right answer, 0 for a wrong one."""

    split: Split
    head: LinearHead
    batch_size: int = 256
    autocast: torch.dtype | None = None

    def __len__(self) -> int:
        return len(self.split)

    def __call__(self, model: FlatModel, ids: Tensor) -> Tensor:
        """uint8 (n,), as `predict_correct` gives it."""
        return predict_correct(model, self.head, self.split, ids, self.batch_size, self.autocast)
