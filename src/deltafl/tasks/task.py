"""What everything that trains or judges knows of data: examples in batches, a loss and a score."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from deltafl.errors import DeltaflError

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")

Batch = Mapping[str, Tensor]
"""Named tensors (B, ...) on the model's device."""

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
        device: torch.device | str = "cpu",
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

    def to(self, device: torch.device | str) -> "Task":
        """The task with its data on `device`; itself where that gains nothing."""
        return self


def hash_of(*parts: Tensor | str) -> str:
    """sha256 of the bytes of tensors and texts, in order."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, str):
            digest.update(part.encode())
        else:
            digest.update(part.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def check_task(task: Task, model: Model, device: torch.device | str = "cpu") -> None:
    """Judge `model`, which is in eval mode, on two training examples, so that a task of a user's own
    that breaks a promise is found before anything is trained.

    Raises:
        DeltaflError: which field of the task is of another shape or dtype, or not finite.
    """
    for split in SPLITS:
        count, groups = task.size(split), task.groups(split)
        if count < 1 or groups.dtype != torch.int64 or groups.shape != (count,):
            raise DeltaflError(
                f'task "{task.name}": size("{split}") is {count}, groups("{split}") is '
                f"{groups.dtype} {tuple(groups.shape)}; they must be N > 0 and int64 (N,)"
            )
    ids = torch.arange(min(2, task.size("train")))
    batch = task.batch("train", ids, device)
    for name, tensor in batch.items():
        if not len(tensor) == len(ids):
            raise DeltaflError(
                f'task "{task.name}": batch["{name}"] is {tuple(tensor.shape)}, its first dimension '
                f"must be {len(ids)}, the examples asked for"
            )
    with torch.no_grad():
        sums, weights = task.loss(model, batch)
        score = task.score(model, batch)
    for what, values in (("loss sums", sums), ("loss weights", weights), ("score", score)):
        check_values(values, len(ids), f'{what} of task "{task.name}"')


def check_values(values: Tensor, count: int, what: str) -> None:
    """Raise DeltaflError if `values` are not `count` finite float numbers."""
    if not values.is_floating_point() or values.shape != (count,):
        raise DeltaflError(
            f"{what} must be float ({count},), one for each example, not "
            f"{values.dtype} {tuple(values.shape)}"
        )
    if len(wrong := (~values.isfinite()).nonzero().flatten()):
        raise DeltaflError(f"{what}: {values[wrong[0]]} for example {wrong[0]} of {count}")
