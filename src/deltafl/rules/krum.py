"""Krum and Multi-Krum (arXiv 1703.02757): keep the deltas that lie closest to their neighbours."""

from collections.abc import Sequence
from dataclasses import dataclass

from deltafl.errors import DeltaflError
from deltafl.rules.rule import RULES, LinearRule, Source, Stats, Tensor


def closest(
    rule: str, gram: Tensor, weights: Tensor, num_byzantine: int, num_selected: int | None
) -> Tensor:
    """Their weights where the Krum score is among the smallest `num_selected`, else 0; sum 1.

    Of the n deltas with weight above 0, num_selected None: n - f. score_i = sum of the n - f - 2
    smallest ||delta_i - delta_j||^2, j != i. Equal scores (the two of a closest pair always have them
    when n - f - 2 = 1) are decided by the sum of all distances, then by order.
    """
    active = [i for i, w in enumerate(weights.tolist()) if w > 0]
    n = len(active)
    if problems := too_few(rule, num_byzantine, n, num_selected):
        raise DeltaflError(*problems)
    gram = gram[active][:, active]
    norms = gram.diagonal()
    squares = (norms[:, None] + norms[None, :] - 2 * gram).clamp_min(0)
    squares.fill_diagonal_(0)
    scores = squares.sort(1).values[:, 1 : n - num_byzantine - 1].sum(1).tolist()
    totals = squares.sum(1).tolist()
    order = sorted(range(n), key=lambda i: (scores[i], totals[i], i))
    kept = order[: n - num_byzantine if num_selected is None else num_selected]
    chosen = weights * 0
    chosen[[active[i] for i in kept]] = weights[[active[i] for i in kept]]
    return chosen / chosen.sum()


def too_few(rule: str, num_byzantine: int, n: int, num_selected: int | None) -> list[str]:
    """A line unless f >= 0, n >= 2f + 3 and 1 <= num_selected <= n."""
    least = 2 * num_byzantine + 3
    if num_byzantine < 0 or n < least:
        return [
            f"{rule}: {n} models of weight above 0 with num_byzantine {num_byzantine}; "
            f"it must be 0 or more and needs at least 2f + 3 = {least} models"
        ]
    if num_selected is not None and not 1 <= num_selected <= n:
        return [
            f"{rule}: num_selected is {num_selected}; it must be in 1 to {n}, the number of models"
        ]
    return []


@RULES.register("krum")
@dataclass(frozen=True)
class Krum(LinearRule):
    """The one delta with the smallest score, where at most `num_byzantine` (f) models are attackers."""

    num_byzantine: int = 0

    needs_gram = True

    def problems(self, sources: Sequence[Source]) -> list[str]:
        return too_few("krum", self.num_byzantine, len(sources), None)

    def coefficients(self, stats: Stats, weights: Tensor) -> Tensor:
        return closest("krum", stats.gram, weights, self.num_byzantine, 1)


@RULES.register("multi_krum")
@dataclass(frozen=True)
class MultiKrum(LinearRule):
    """The (weighted) mean of the `num_selected` deltas with the smallest scores; n - f if not given."""

    num_byzantine: int = 0
    num_selected: int | None = None

    needs_gram = True

    def problems(self, sources: Sequence[Source]) -> list[str]:
        return too_few("multi_krum", self.num_byzantine, len(sources), self.num_selected)

    def coefficients(self, stats: Stats, weights: Tensor) -> Tensor:
        return closest("multi_krum", stats.gram, weights, self.num_byzantine, self.num_selected)
