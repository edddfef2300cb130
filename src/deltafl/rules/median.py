"""Coordinate-wise median (arXiv 1803.01498)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from deltafl.errors import DeltaflError
from deltafl.rules.ordering import ranks, weighted_median
from deltafl.rules.rule import NO_TRANSFORMS, RULES, Traits

if TYPE_CHECKING:
    from torch import Tensor


@RULES.register("median")
@dataclass(frozen=True)
class Median:
    """The middle value of each coordinate; of an even number, the midpoint of the two or the lower one.

    "lower" is torch.median's choice and so that of the code of arXiv 2411.18607. With unequal weights: the weighted
    median, the value at which the summed weights pass one half.
    """

    middle: Literal["midpoint", "lower"] = "midpoint"

    transforms = NO_TRANSFORMS

    def __post_init__(self) -> None:
        if self.middle not in ("midpoint", "lower"):
            raise DeltaflError(f'median: middle is "{self.middle}"; it must be midpoint or lower')

    @property
    def traits(self) -> Traits:
        return Traits(odd=self.middle == "midpoint")

    @classmethod
    def examples(cls) -> Iterable[Median]:
        return (cls(), cls("lower"))

    def combine(self, block: Tensor, weights: Sequence[float]) -> Tensor:
        n = len(weights)
        if len(set(weights)) > 1:
            lower, upper = weighted_median(block, weights)
        else:
            lower, upper = ranks(block, [(n - 1) // 2, n // 2])
        return lower if self.middle == "lower" or lower is upper else (lower + upper) * 0.5
