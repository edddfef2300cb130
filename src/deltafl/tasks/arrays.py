"""The one form in which every data set is used."""

from dataclasses import dataclass

import torch
from torch import Tensor

from deltafl.tasks.images import Images, ImageTask


@dataclass(frozen=True)
class Split:
    """Images as uint8 (N, C, H, W), possibly memory-mapped, and labels as int64 (N,)."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def at(self, ids: Tensor, device: torch.device | str) -> tuple[Tensor, Tensor]:
        """Images and labels of the examples at `ids`, int64 (B,), on `device`; whole images are copied, not pixels."""
        images = self.images.index_select(0, ids.to(self.images.device))
        return images.to(device), self.labels.index_select(0, ids.to(self.labels.device)).to(device)


@dataclass(frozen=True)
class Task:
    """A classification task: `val` chooses, `test` is looked at once."""

    name: str
    train: Split
    val: Split
    test: Split
    class_names: tuple[str, ...]


def image_task(task: Task) -> ImageTask:
    """The same data as an `ImageTask`; goes when every room uses it."""
    parts = {"train": task.train, "val": task.val, "test": task.test}
    splits = {split: Images(part.images, part.labels) for split, part in parts.items()}
    return ImageTask(task.name, splits, task.class_names)
