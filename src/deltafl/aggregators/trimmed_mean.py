"""Coordinate-wise trimmed mean (arXiv 1803.01498)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from deltafl.aggregators.ordering import ranks
from deltafl.aggregators.weighted import weighted_sum
from deltafl.errors import DeltaflError
from deltafl.rules import NO_TRANSFORMS, RULES, Source, Traits

if TYPE_CHECKING:
    from torch import Tensor


@RULES.register("trimmed_mean")
@dataclass(frozen=True)
class TrimmedMean:
    """Drop the `trim` smallest and the `trim` largest values of each coordinate; (weighted) mean of the rest."""

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
        if 2 * self.trim >= len(sources):
            raise DeltaflError(
                f"trimmed_mean: trim {self.trim} leaves nothing of {len(sources)} models; "
                f"lower --trim or merge at least {2 * self.trim + 1}"
            )

    def combine(self, block: Tensor, weights: Sequence[float]) -> Tensor:
        n, kept = len(weights), range(self.trim, len(weights) - self.trim)
        if len(set(weights)) == 1:
            return weighted_sum(ranks(block, kept), [1 / len(kept)] * len(kept))
        order = block.argsort(0, stable=True)[self.trim : n - self.trim]
        share = block.new_tensor(weights)[order]
        return (block.gather(0, order) * share).sum(0) / share.sum(0)
