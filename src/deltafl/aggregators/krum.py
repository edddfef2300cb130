"""Krum and Multi-Krum (arXiv 1703.02757): keep the deltas that lie closest to their neighbours."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from deltafl.errors import DeltaflError
from deltafl.rules import NO_TRANSFORMS, RULES, Source, Stats, Traits

if TYPE_CHECKING:
    from torch import Tensor


def closest(gram: Tensor, num_byzantine: int, keep: int) -> list[int]:
    """Indices of the `keep` deltas with the smallest Krum score.

    score_i = sum of the n - f - 2 smallest ||delta_i - delta_j||^2, j != i. Equal scores (the two of a closest pair
    always have them when n - f - 2 = 1) are decided by the sum of all distances, then by order.
    """
    n = len(gram)
    norms = gram.diagonal()
    squares = (norms[:, None] + norms[None, :] - 2 * gram).clamp_min(0)
    squares.fill_diagonal_(0)
    scores = squares.sort(1).values[:, 1 : n - num_byzantine - 1].sum(1).tolist()
    totals = squares.sum(1).tolist()
    return sorted(range(n), key=lambda i: (scores[i], totals[i], i))[:keep]


def check_models(rule: str, num_byzantine: int, sources: Sequence[Source]) -> None:
    """Raise DeltaflError unless f >= 0 and n >= 2f + 3."""
    least = 2 * num_byzantine + 3
    if num_byzantine < 0 or len(sources) < least:
        raise DeltaflError(
            f"{rule}: {len(sources)} models with num_byzantine {num_byzantine}; "
            f"it must be 0 or more and needs at least 2f + 3 = {least} models"
        )


@RULES.register("krum")
@dataclass(frozen=True)
class Krum:
    """The one delta with the smallest score, where at most `num_byzantine` (f) of the models are attackers."""

    num_byzantine: int = 0

    traits = Traits()
    transforms = NO_TRANSFORMS
    needs_gram = True

    @classmethod
    def examples(cls) -> Iterable[Krum]:
        return (cls(),)

    def check(self, sources: Sequence[Source]) -> None:
        check_models("krum", self.num_byzantine, sources)

    def coefficients(self, stats: Stats, weights: Tensor) -> Tensor:
        assert stats.gram is not None
        chosen = weights * 0
        chosen[closest(stats.gram, self.num_byzantine, 1)] = 1.0
        return chosen


@RULES.register("multi_krum")
@dataclass(frozen=True)
class MultiKrum:
    """The (weighted) mean of the `num_selected` deltas with the smallest scores; n - f of them if not given."""

    num_byzantine: int = 0
    num_selected: int | None = None

    traits = Traits()
    transforms = NO_TRANSFORMS
    needs_gram = True

    @classmethod
    def examples(cls) -> Iterable[MultiKrum]:
        return (cls(), cls(num_selected=2))

    def check(self, sources: Sequence[Source]) -> None:
        check_models("multi_krum", self.num_byzantine, sources)
        if self.num_selected is not None and not 1 <= self.num_selected <= len(sources):
            raise DeltaflError(f"multi_krum: num_selected is {self.num_selected} of {len(sources)} models")

    def coefficients(self, stats: Stats, weights: Tensor) -> Tensor:
        assert stats.gram is not None
        keep = self.num_selected or len(weights) - self.num_byzantine
        chosen = weights * 0
        kept = closest(stats.gram, self.num_byzantine, keep)
        chosen[kept] = weights[kept]
        if chosen.sum() == 0:
            raise DeltaflError("multi_krum: every selected model has weight 0; raise --num-selected or the weights")
        return chosen / chosen.sum()
