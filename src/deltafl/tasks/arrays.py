"""The old form of tasks, for rooms that have not been ported; goes when all are."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from deltafl.tasks.images import Images, ImageTask
from deltafl.tasks.inputs import ImageInput
from deltafl.tasks.loading import load_task
from deltafl.tasks.recipe import DataRecipe
from deltafl.tasks.task import Task as AnyTask


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


def arrays_of(task: AnyTask) -> Task:
    """The same data in the old form."""
    assert isinstance(task, ImageTask)
    parts = {split: Split(part.images, part.labels) for split, part in task.splits.items()}
    return Task(task.name, **parts, class_names=task.class_names)


def load_arrays(
    spec: str,
    *,
    image_size: int,
    channels: int = 3,
    seed: int = 0,
    limit: int | None = None,
    data_dir: str | Path | None = None,
) -> Task:
    """`load_task` in the old form."""
    recipe = DataRecipe.of(data=spec, data_dir=data_dir and str(data_dir), limit=limit)
    task = load_task(recipe, ImageInput(image_size, channels), seed)
    return arrays_of(task)
