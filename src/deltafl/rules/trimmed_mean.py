"""Coordinate-wise trimmed mean (arXiv 1803.01498)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from deltafl.errors import DeltaflError
from deltafl.rules.ordering import ranks
from deltafl.rules.rule import NO_TRANSFORMS, RULES, Source, Traits
from deltafl.rules.weighted import weighted_sum

if TYPE_CHECKING:
    from torch import Tensor


@RULES.register("trimmed_mean")
@dataclass(frozen=True)
class TrimmedMean:
    """Drop the `trim` smallest and the `trim` largest values of each coordinate; mean of the rest.

    With unequal weights: drop the share trim / n of the total weight at either end (n models of weight above 0), so
    that a value at the boundary counts in part and neither equal values nor the order of the models matter.
    """

    trim: int = 1

    traits = Traits()
    transforms = NO_TRANSFORMS

    def __post_init__(self) -> None:
        if self.trim < 0:
            raise DeltaflError(f"trimmed_mean: trim is {self.trim}; it must be 0 or more")

    @classmethod
    def examples(cls) -> Iterable[TrimmedMean]:
        return (cls(0), cls(1))

    def check(self, sources: Sequence[Source]) -> None:
        self._refuse_empty(len(sources))

    def _refuse_empty(self, n: int) -> None:
        if 2 * self.trim >= n:
            raise DeltaflError(
                f"trimmed_mean: trim {self.trim} leaves nothing of {n} models of weight above 0; "
                f"lower --trim or merge at least {2 * self.trim + 1}"
            )

    def combine(self, block: Tensor, weights: Sequence[float]) -> Tensor:
        n = sum(w > 0 for w in weights)
        self._refuse_empty(n)
        if len(set(weights)) == 1:
            kept = range(self.trim, n - self.trim)
            return weighted_sum(ranks(block, kept), [1 / len(kept)] * len(kept))
        values, order = block.sort(dim=0, stable=True)
        low = self.trim / n
        reached = block.new_tensor(weights)[order].cumsum(0).clamp_(low, 1 - low)
        share = reached.diff(dim=0, prepend=block.new_full((1, block.shape[1]), low))
        return weighted_sum(values * share, [1 / (1 - 2 * low)] * len(weights))
