"""A task of some of the classes: what divides one data set among several fine-tunes."""

from dataclasses import replace

import torch
from torch import Tensor

from deltafl.errors import DeltaflError
from deltafl.tasks.arrays import Split, Task


def class_groups(classes: int, parts: int, generator: torch.Generator) -> list[Tensor]:
    """`parts` disjoint groups of the classes 0 .. `classes` - 1 at random, sizes differing by at most 1, ascending.

    Raises:
        DeltaflError: fewer classes than groups, or no group.
    """
    if not 1 <= parts <= classes:
        raise DeltaflError(
            f"{classes} classes cannot be dealt into {parts} groups; take 1 to {classes}"
        )
    return [
        group.sort().values
        for group in torch.randperm(classes, generator=generator).tensor_split(parts)
    ]


def only_classes(task: Task, classes: Tensor, name: str) -> Task:
    """The examples whose label is in `classes`, int64 (n,); labels and class names stay, so that a head fits all parts.

    Raises:
        DeltaflError: a split has no such example.
    """
    splits = {split: _only(getattr(task, split), classes) for split in ("train", "val", "test")}
    if empty := [split for split, own in splits.items() if not len(own)]:
        raise DeltaflError(
            f'task "{name}" has no example in {", ".join(empty)}; take fewer parts or more data'
        )
    return replace(task, name=name, **splits)


def _only(split: Split, classes: Tensor) -> Split:
    rows = torch.isin(split.labels, classes).nonzero().flatten()
    return Split(split.images[rows], split.labels[rows])
