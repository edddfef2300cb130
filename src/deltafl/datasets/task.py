"""The one form in which every data set is used."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Split:
    """Images as uint8 (N, C, H, W), possibly memory-mapped, and labels as int64 (N,)."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Task:
    """A classification task: `val` chooses, `test` is looked at once."""

    name: str
    train: Split
    val: Split
    test: Split
    class_names: tuple[str, ...]
