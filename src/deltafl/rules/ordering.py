"""Order statistics of a few models by min/max networks: vectors, not a sort per coordinate."""

import functools
import math
from collections.abc import Iterable, Sequence

from deltafl.rules.rule import Tensor, Threshold


@functools.cache
def network(n: int) -> tuple[tuple[int, int], ...]:
    """Comparators (i, j), i < j, that sort n values: Batcher's exchange (Knuth vol. 3, 5.2.2 M)."""
    powers, pairs = [1 << i for i in range((n - 1).bit_length())], []
    for p in reversed(powers):
        for d, r in [(p, 0), *((q - p, p) for q in reversed(powers) if q > p)]:
            pairs += [(i, i + d) for i in range(n - d) if i & p == r]
    return tuple(pairs)


@functools.cache
def selection_network(n: int, wanted: frozenset[int]) -> tuple[tuple[int, int, bool, bool], ...]:
    """The part of `network(n)` on which the wanted ranks depend: (i, j, min needed, max needed)."""
    live, kept = set(wanted), []
    for i, j in reversed(network(n)):
        if i in live or j in live:
            kept.append((i, j, i in live, j in live))
            live |= {i, j}
    return tuple(reversed(kept))


def ranks(block: Tensor, wanted: Iterable[int]) -> list[Tensor]:
    """The wanted ranks (0: smallest) of each column, (n, m) -> one (m,) for each; NaN spreads."""
    wanted = list(wanted)
    rows = list(block.unbind(0))
    for i, j, low, high in selection_network(len(rows), frozenset(wanted)):
        a, b = rows[i], rows[j]
        if low:
            rows[i] = a.minimum(b)
        if high:
            rows[j] = a.maximum(b)
    return [rows[k] for k in wanted]


def largest(row: Tensor, k: int) -> Threshold:
    """The threshold that keeps the k largest magnitudes of (m,); NaN counts as infinite."""
    if not k:
        return Threshold(math.inf, len(row))
    magnitudes = row.abs().float().nan_to_num_(math.inf, math.inf)
    value = magnitudes.kthvalue(len(row) - k + 1).values
    equal = (magnitudes == value).nonzero()
    return Threshold(float(value), int(equal[k - 1 - int((magnitudes > value).sum())]) + 1)


def weighted_median(block: Tensor, weights: Sequence[float]) -> tuple[Tensor, Tensor]:
    """The lower and the upper weighted median of each column, (n, m) -> two (m,).

    Lower: the smallest value at which the summed weights reach one half; upper: at which they
    exceed it.
    """
    import torch

    values, order = block.sort(dim=0, stable=True)
    reached = torch.tensor(weights, dtype=torch.float64, device=block.device)[order].cumsum(0)
    lower = (reached < 0.5 - 1e-9).sum(0, keepdim=True)
    upper = (reached <= 0.5 + 1e-9).sum(0, keepdim=True).clamp_max(len(weights) - 1)
    return values.gather(0, lower)[0], values.gather(0, upper)[0]
