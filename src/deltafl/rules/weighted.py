"""The weighted sum over models that several rules share, in the order given."""

from collections.abc import Sequence

from deltafl.rules.rule import Tensor


def weighted_sum(rows: Tensor | Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """sum_i p_i row_i: multiply, then add, in the models' order; (n, m) or n times (m,) -> (m,).

    Two roundings per model, never a fused multiply-add: vector code and the tail of a block then
    round alike. Equal weights multiply the sum, once.
    """
    if len(set(weights)) == 1:
        total = rows[0] + rows[1] if len(weights) > 1 else rows[0].clone()
        for row in rows[2:]:
            total += row
        return total if weights[0] == 1 else total.mul_(weights[0])
    total = rows[0] * weights[0]
    for row, weight in zip(rows[1:], weights[1:], strict=True):
        total += row * weight
    return total
