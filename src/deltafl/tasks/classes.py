"""A task of some of the classes: what divides one data set among several fine-tunes."""

import torch
from torch import Tensor

from deltafl.errors import DeltaflError
from deltafl.tasks.task import SPLITS, Task


def class_groups(classes: int, parts: int, generator: torch.Generator) -> list[Tensor]:
    """`parts` disjoint groups of the classes 0 .. `classes` - 1 at random, sizes differing by at
    most 1, ascending.

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
    """The examples of which `task.groups` is in `classes`, int64 (n,); what there is to tell apart
    stays, so that one head fits all parts.

    Raises:
        DeltaflError: a split has no such example, or the task cannot be divided.
    """
    rows = {split: torch.isin(task.groups(split), classes).nonzero().flatten() for split in SPLITS}
    return task.only(rows, name)
