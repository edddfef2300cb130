"""Image classification: uint8 images of one size and a class for each."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from deltafl.errors import DeltaflError
from deltafl.tasks.recipe import Augmentation
from deltafl.tasks.task import SPLITS, Batch, Device, HeldTask, Model, Split, drawn, hash_of


@dataclass(frozen=True, eq=False)
class Images:
    """uint8 (N, C, H, W), possibly memory-mapped, and their classes, int64 (N,)."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def at(self, rows: Tensor) -> "Images":
        """Those at `rows`, int64; whole images are copied, not pixels."""
        rows = rows.to(self.images.device)
        return Images(self.images.index_select(0, rows), self.labels.index_select(0, rows))

    def to(self, device: Device) -> "Images":
        """The same on another device."""
        return Images(self.images.to(device), self.labels.to(device))


@dataclass(frozen=True, eq=False)
class ImageTask(HeldTask):
    """Classification by cross-entropy; `model(images)` gives logits (B, K).

    A batch is {"images": uint8 (B, C, H, W), "labels": int64 (B,)}; of training, `augment`-ed
    and with {"smoothing": float32 (B,)} where `label_smoothing` is not 0: the target is then
    (1 - s) one-hot + s / K. Score: 1 where the largest logit is the label's, else 0.

    Raises:
        DeltaflError: a split is missing or empty, its tensors are of another kind, or a label is
            not below the number of class names.
    """

    splits: Mapping[str, Images]
    class_names: tuple[str, ...]
    augment: Augmentation = "none"
    label_smoothing: float = 0.0

    metric = "accuracy"
    ratio_scaled = True

    def __post_init__(self) -> None:
        for split in SPLITS:
            where, part = f'split {split} of task "{self.name}"', self.splits.get(split)
            if (
                part is None
                or (part.images.dtype, part.labels.dtype) != (torch.uint8, torch.int64)
                or part.images.shape[:-3] != part.labels.shape
            ):
                raise DeltaflError(f"{where} must be Images of uint8 (N, C, H, W) and int64 (N,)")
            check_labels(part.labels, len(self.class_names), where)

    def groups(self, split: Split) -> Tensor:
        return self.splits[split].labels.cpu()

    def batch(
        self,
        split: Split,
        ids: Tensor,
        device: Device = "cpu",
        generator: torch.Generator | None = None,
    ) -> Batch:
        part = self.splits[split].at(ids).to(device)
        images, smoothed = part.images, {}
        if generator is not None:
            if self.augment == "crop_flip":
                images = random_crop(images, max(1, images.shape[-1] // 8), generator)
            if self.augment != "none":
                images = random_flip(images, generator)
            if self.label_smoothing:
                smoothed["smoothing"] = torch.full((len(ids),), self.label_smoothing, device=device)
        return {"images": images, "labels": part.labels, **smoothed}

    def loss(self, model: Model, batch: Batch) -> tuple[Tensor, Tensor]:
        logits = model(batch["images"]).float()
        losses = nn.functional.cross_entropy(logits, batch["labels"], reduction="none")
        if "smoothing" in batch:
            losses = torch.lerp(losses, -logits.log_softmax(1).mean(1), batch["smoothing"])
        return losses, torch.ones_like(losses)

    def score(self, model: Model, batch: Batch) -> Tensor:
        return (model(batch["images"]).argmax(1) == batch["labels"]).float()

    def sampled(self, model: Model, batch: Batch, generator: torch.Generator) -> Batch:
        """Labels drawn from softmax(logits)."""
        chances = model(batch["images"]).float().softmax(1)
        return {**batch, "labels": drawn(chances, generator)}

    def fingerprint(self) -> str:
        """Of all labels, of 64 images spread over each split, and of the class names."""
        parts = [self.splits[s] for s in SPLITS]
        some = [p.images[:: max(1, len(p) // 64)] for p in parts]
        return hash_of(*(p.labels for p in parts), *some, *self.class_names)

    def to(self, device: Device) -> "ImageTask":
        return replace(self, splits={s: part.to(device) for s, part in self.splits.items()})


def check_labels(labels: Tensor, classes: int, where: str) -> None:
    """Raise DeltaflError if there is no label, or one outside 0 .. `classes` - 1."""
    if not len(labels):
        raise DeltaflError(f"{where} is empty. Every split of a task needs examples.")
    wrong = ((labels < 0) | (labels >= classes)).nonzero().flatten()
    if len(wrong):
        raise DeltaflError(
            f"{where}: the label of row {wrong[0]} is {labels[wrong[0]]}, but there are {classes} "
            f"class names (0 to {classes - 1}); {len(wrong)} of {len(labels)} labels are outside. "
            "Correct the labels or the list of class names."
        )


def random_crop(images: Tensor, padding: int, generator: torch.Generator) -> Tensor:
    """Each image shifted by up to `padding` pixels in both directions, zeros coming in; same shape
    and dtype.

    Draws two integers per image from `generator` (on its own device): uniform over the (2 padding +
    1)^2 shifts.
    """
    n, _, height, width = images.shape
    shifts = torch.randint(2 * padding + 1, (2, n), generator=generator, device=generator.device)
    padded = nn.functional.pad(images, [padding] * 4)
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)
    return windows[torch.arange(n), :, *shifts.to(images.device)]


def random_flip(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image (N, C, H, W) mirrored left to right with probability one half; same shape and
    dtype.
    """
    size = len(images), 1, 1, 1
    flips = torch.randint(2, size, generator=generator, device=generator.device).bool()
    return torch.where(flips.to(images.device), images.flip(-1), images)
