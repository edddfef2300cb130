"""Coordinate-wise median (arXiv 1803.01498)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from deltafl.rules.ordering import ranks, weighted_median
from deltafl.rules.rule import RULES, CoordinateRule, Tensor, Traits


@RULES.register("median")
@dataclass(frozen=True)
class Median(CoordinateRule):
    """The middle value of each coordinate; of an even number, the midpoint of the two or the lower.

    "lower" is torch.median's choice and so that of the code of arXiv 2411.18607. With unequal
    weights: the weighted median, the value at which the summed weights pass one half.
    """

    middle: Literal["midpoint", "lower"] = "midpoint"

    @property
    def traits(self) -> Traits:
        return Traits(odd=self.middle == "midpoint")

    def combine(self, block: Tensor, weights: Sequence[float]) -> Tensor:
        n = len(weights)
        if len(set(weights)) > 1:
            lower, upper = weighted_median(block, weights)
        else:
            lower, upper = ranks(block, [(n - 1) // 2, n // 2])
        return lower if self.middle == "lower" or lower is upper else (lower + upper) * 0.5
