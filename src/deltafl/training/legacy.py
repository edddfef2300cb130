"""Training and judging of encoder and head apart; goes when every room uses `Net` and `Task`."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from deltafl.models import HeadRecipe, LoadedEncoder
from deltafl.models.bridge import net_of
from deltafl.models.fit import classifier_of
from deltafl.models.flat import FlatModel
from deltafl.models.heads import LinearHead
from deltafl.tasks.arrays import Split, Task, image_task


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


def zero_shot_for(encoder: LoadedEncoder, task: Task, templates: str | None = None) -> LinearHead:
    """The zero-shot head of a CLIP encoder; `templates` is a file of prompts, None: the catalogue's."""
    net = net_of(encoder)
    net.prepare(image_task(task), HeadRecipe.of(head="zero-shot", templates=templates))
    head = classifier_of(net).head
    assert head is not None
    return LinearHead.of(head)
