"""Coordinate-wise trimmed mean (arXiv 1803.01498)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from deltafl.errors import DeltaflError
from deltafl.rules.ordering import ranks
from deltafl.rules.rule import RULES, CoordinateRule, Source, Tensor, Within
from deltafl.rules.weighted import weighted_sum


@RULES.register("trimmed_mean")
@dataclass(frozen=True)
class TrimmedMean(CoordinateRule):
    """Drop the `trim` smallest and the `trim` largest values of each coordinate; mean of the rest.

    With unequal weights: drop the share trim / n of the total weight at either end (n models of
    weight above 0), so that a value at the boundary counts in part and neither equal values nor the
    order of the models matter.
    """

    trim: Annotated[int, Within(0)] = 1

    def problems(self, sources: Sequence[Source]) -> list[str]:
        return self._too_few(len(sources))

    def _too_few(self, n: int) -> list[str]:
        line = (
            f"trimmed_mean: trim {self.trim} leaves nothing of {n} models of weight above 0; "
            f"lower --trim or merge at least {2 * self.trim + 1}"
        )
        return [line] if 2 * self.trim >= n else []

    def combine(self, block: Tensor, weights: Sequence[float]) -> Tensor:
        n = len(weights)
        if problems := self._too_few(n):
            raise DeltaflError(*problems)
        if len(set(weights)) == 1:
            kept = range(self.trim, n - self.trim)
            return weighted_sum(ranks(block, kept), [1 / len(kept)] * len(kept))
        values, order = block.sort(dim=0, stable=True)
        low = self.trim / n
        reached = block.new_tensor(weights)[order].cumsum(0).clamp_(low, 1 - low)
        share = reached.diff(dim=0, prepend=block.new_full((1, block.shape[1]), low))
        return weighted_sum(values * share, [1 / (1 - 2 * low)] * len(weights))
