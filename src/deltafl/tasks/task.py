"""What everything that trains or judges knows of data: examples in batches, a loss and a score."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

import torch
from torch import Tensor

from deltafl.errors import DeltaflError

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")

Batch = Mapping[str, Tensor]
"""Named tensors (B, ...) on the model's device."""

Device = torch.device | str

Model = Callable[..., Any]
"""A module, a `Net` or anything called like it: a function of other parameters, under vmap."""


class Task(ABC):
    """Data, objective and score; no weights. `val` chooses, `test` is looked at once.

    `metric` names the score ("accuracy"). `ratio_scaled`: scores have a zero and may be divided
    by one another; a log-likelihood may not.
    """

    name: str
    metric: str = "score"
    ratio_scaled: bool = False

    @abstractmethod
    def size(self, split: Split) -> int:
        """Number of examples; their ids are 0 .. size - 1."""

    @abstractmethod
    def batch(
        self,
        split: Split,
        ids: Tensor,
        device: Device = "cpu",
        generator: torch.Generator | None = None,
    ) -> Batch:
        """The examples at `ids`, int64 (B,), in that order.

        generator: given where a model trains on the batch; augmentation is drawn from it, and
        what softens the target (label smoothing) is in the batch. None: the examples as they are.
        """

    @abstractmethod
    def loss(self, model: Model, batch: Batch) -> tuple[Tensor, Tensor]:
        """For each example the sum of its losses and how many they are, both float (B,).

        The mean loss is sums.sum() / weights.sum(): over examples of classification, over tokens
        of language. Nothing of one example depends on another.
        """

    @abstractmethod
    def score(self, model: Model, batch: Batch) -> Tensor:
        """For each example how well it is done, (B,), larger is better; may be negative."""

    def lengths(self, split: Split) -> Tensor | None:
        """int64 (N,): what each example takes beside others of a batch; None: all the same."""
        return None

    def quick(self) -> "Task":
        """The task as `check_task` tries it: itself, or one whose score costs less."""
        return self

    def groups(self, split: Split) -> Tensor:
        """int64 (N,): the class, source or author of each example, which shards go by."""
        return torch.zeros(self.size(split), dtype=torch.int64)

    def sampled(self, model: Model, batch: Batch, generator: torch.Generator) -> Batch:
        """The batch with targets drawn from the model's own distribution, for Fisher scores.

        Raises:
            DeltaflError: the task has no such distribution.
        """
        raise DeltaflError(
            f'task "{self.name}" draws no labels from a model; use fisher_labels empirical'
        )

    @abstractmethod
    def fingerprint(self) -> str:
        """A hash of the data: what decides whether a run may go on, and what is cached."""

    def only(self, rows: Mapping[str, Tensor], name: str) -> "Task":
        """The examples at `rows`, int64 for each split, as a task of their own.

        Raises:
            DeltaflError: the task cannot be divided.
        """
        raise DeltaflError(f'task "{self.name}" cannot be divided; give its parts as tasks')

    def to(self, device: Device) -> "Task":
        """The task with its data on `device`; itself where that gains nothing."""
        return self


@dataclass(frozen=True, eq=False)
class HeldTask(Task):
    """A task that holds its examples, by split: what has a length and, `at` rows int64, a part."""

    name: str
    splits: Mapping[str, Any]

    def size(self, split: Split) -> int:
        return len(self.splits[split])

    def only(self, rows: Mapping[str, Tensor], name: str) -> Self:
        """What there is to tell apart stays, so that one head fits all parts."""
        if empty := [s for s in SPLITS if self.size(s) and not len(rows[s])]:
            raise DeltaflError(
                f'task "{name}" has no example in {", ".join(empty)}; take fewer parts or more data'
            )
        splits = {split: self.splits[split].at(rows[split]) for split in SPLITS}
        return replace(self, name=name, splits=splits)


def hash_of(*parts: Tensor | str) -> str:
    """sha256 of the bytes of tensors and texts, in order."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode() if isinstance(part, str) else part.cpu().numpy().tobytes())
    return digest.hexdigest()


def check_task(task: Task, model: Model, device: Device = "cpu") -> None:
    """Let `model`, in eval mode, do two examples, of training where there are some, so that a task
    of a user's own that breaks a promise is found before anything trains.

    Raises:
        DeltaflError: which field of the task is of another shape or dtype, or not finite.
    """
    split = max(SPLITS, key=lambda s: task.size(s) > 0)
    ids, task = torch.arange(min(2, task.size(split))), task.quick()
    batch = task.batch(split, ids, device)
    wrong = [f"batch[{name}]" for name, tensor in batch.items() if len(tensor) != len(ids)]
    wrong += [f"groups({s})" for s in SPLITS if task.groups(s).shape != (task.size(s),)]
    if wrong:
        raise DeltaflError(
            f'task "{task.name}": {", ".join(wrong)} must hold one row for each example'
        )
    with torch.no_grad():
        found = *task.loss(model, batch), task.score(model, batch).float()
    for field, values in zip(
        ("the sums of loss", "the weights of loss", "score"), found, strict=True
    ):
        check_values(task, field, values, len(ids))


def require_examples(task: Task, *splits: Split) -> None:
    """Raise DeltaflError where a split of the task is empty."""
    if any(not task.size(split) for split in splits):
        counts = " and ".join(f"{task.size(split)} {split}" for split in splits)
        raise DeltaflError(f'task "{task.name}" has {counts} examples; all splits need some')


def check_values(
    task: Task, field: str, values: Tensor, count: int, *, finite: bool = True
) -> None:
    """Raise DeltaflError if `values`, a field of `task`, are not `count` float numbers, all finite
    unless a model may have diverged.
    """
    if not values.is_floating_point() or values.shape != (count,):
        raise DeltaflError(
            f'task "{task.name}": {field} must be float ({count},), a number for each example, not '
            f"{values.dtype} {tuple(values.shape)}"
        )
    if finite and not values.isfinite().all():
        raise DeltaflError(f'task "{task.name}": {field} is not finite: {values.tolist()[:9]}')


def drawn(chances: Tensor, generator: torch.Generator) -> Tensor:
    """An index for each row of `chances`, (..., K) that sum to about 1 -> int64 (...), on their
    device.

    One number of `generator` each, in order, so that what is drawn does not depend on how rows are
    cut into batches.
    """
    below = chances.detach().double().cumsum(-1)
    total = below[..., -1:]
    uniform = torch.rand(total.shape, dtype=torch.float64, generator=generator).to(total.device)
    return (below <= uniform * total).sum(-1).clamp_(max=below.shape[-1] - 1)
