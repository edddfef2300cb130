"""Krum and Multi-Krum (arXiv 1703.02757): keep the deltas that lie closest to their neighbours."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from deltafl.errors import DeltaflError
from deltafl.rules.rule import NO_TRANSFORMS, RULES, Source, Stats, Traits

if TYPE_CHECKING:
    from torch import Tensor


def closest(
    rule: str, gram: Tensor, weights: Tensor, num_byzantine: int, num_selected: int | None
) -> list[int]:
    """Indices of the `num_selected` deltas (None: n - f) with the smallest Krum score, of the n with weight above 0.

    score_i = sum of the n - f - 2 smallest ||delta_i - delta_j||^2, j != i. Equal scores (the two of a closest pair
    always have them when n - f - 2 = 1) are decided by the sum of all distances, then by order.
    """
    active = [i for i, w in enumerate(weights.tolist()) if w > 0]
    n = len(active)
    check_models(rule, num_byzantine, n, num_selected)
    gram = gram[active][:, active]
    norms = gram.diagonal()
    squares = (norms[:, None] + norms[None, :] - 2 * gram).clamp_min(0)
    squares.fill_diagonal_(0)
    scores = squares.sort(1).values[:, 1 : n - num_byzantine - 1].sum(1).tolist()
    totals = squares.sum(1).tolist()
    order = sorted(range(n), key=lambda i: (scores[i], totals[i], i))
    return [active[i] for i in order[: n - num_byzantine if num_selected is None else num_selected]]


def check_models(rule: str, num_byzantine: int, n: int, num_selected: int | None = None) -> None:
    """Raise DeltaflError unless f >= 0, n >= 2f + 3 and 1 <= num_selected <= n."""
    least = 2 * num_byzantine + 3
    if num_byzantine < 0 or n < least:
        raise DeltaflError(
            f"{rule}: {n} models of weight above 0 with num_byzantine {num_byzantine}; "
            f"it must be 0 or more and needs at least 2f + 3 = {least} models"
        )
    if num_selected is not None and not 1 <= num_selected <= n:
        raise DeltaflError(
            f"{rule}: num_selected is {num_selected}; it must be in 1 to {n}, the number of models"
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
        check_models("krum", self.num_byzantine, len(sources))

    def coefficients(self, stats: Stats, weights: Tensor) -> Tensor:
        assert stats.gram is not None
        chosen = weights * 0
        chosen[closest("krum", stats.gram, weights, self.num_byzantine, 1)] = 1.0
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
        check_models("multi_krum", self.num_byzantine, len(sources), self.num_selected)

    def coefficients(self, stats: Stats, weights: Tensor) -> Tensor:
        assert stats.gram is not None
        chosen = weights * 0
        kept = closest("multi_krum", stats.gram, weights, self.num_byzantine, self.num_selected)
        chosen[kept] = weights[kept]
        return chosen / chosen.sum()
