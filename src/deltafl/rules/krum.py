"""Krum and Multi-Krum (arXiv 1703.02757): keep the deltas that lie closest to their neighbours."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from deltafl.rules.rule import RULES, LinearRule, Source, Stats, Tensor, Within, check_rule


@RULES.register("krum")
@dataclass(frozen=True)
class Krum(LinearRule):
    """The one delta with the smallest score; at most `num_byzantine` (f) models are attackers.

    score_i = sum of the n - f - 2 smallest ||delta_i - delta_j||^2, j != i, over the n deltas of
    weight above 0. Equal scores (the two of a closest pair always have them when n - f - 2 = 1) are
    decided by the sum of all distances, then by order.
    """

    num_byzantine: Annotated[int, Within(0)] = 0

    needs_gram = True

    def selected(self, n: int) -> int:
        """How many of n deltas are kept."""
        return 1

    def problems(self, sources: Sequence[Source]) -> list[str]:
        n = len(sources)
        least, selected = 2 * self.num_byzantine + 3, self.selected(n)
        if n < least:
            return [
                f"{self.name}: {n} models of weight above 0 with num_byzantine "
                f"{self.num_byzantine}; it needs at least 2f + 3 = {least} models"
            ]
        if not 1 <= selected <= n:
            return [f"{self.name}: num_selected is {selected}; it must be in 1 to {n}, the models"]
        return []

    def coefficients(self, stats: Stats, weights: Tensor) -> Tensor:
        active = [i for i, w in enumerate(weights.tolist()) if w > 0]
        check_rule(self, [stats.sources[i] for i in active])
        n = len(active)
        gram = stats.gram[active][:, active]
        norms = gram.diagonal()
        squares = (norms[:, None] + norms[None, :] - 2 * gram).clamp_min(0)
        squares.fill_diagonal_(0)
        scores = squares.sort(1).values[:, 1 : n - self.num_byzantine - 1].sum(1).tolist()
        totals = squares.sum(1).tolist()
        order = sorted(range(n), key=lambda i: (scores[i], totals[i], i))
        kept = [active[i] for i in order[: self.selected(n)]]
        chosen = weights * 0
        chosen[kept] = weights[kept]
        return chosen / chosen.sum()


@RULES.register("multi_krum")
@dataclass(frozen=True)
class MultiKrum(Krum):
    """The (weighted) mean of the `num_selected` deltas with Krum's smallest scores; else n - f."""

    num_selected: int | None = None

    def selected(self, n: int) -> int:
        return n - self.num_byzantine if self.num_selected is None else self.num_selected
