"""Model Stock (arXiv 2403.19522), as in mergekit."""

from dataclasses import dataclass

from deltafl.rules.directions import DirectionRule, along_rows
from deltafl.rules.rule import RULES, Tensor, Traits


@RULES.register("model_stock")
@dataclass(frozen=True)
class ModelStock(DirectionRule):
    """R = t sum_i p_i delta_i, t = n c / (1 + (n - 1) c), c the mean cosine of pairs, by tensor.

    filter_wise: by rows of the last dimension. t is not clamped: it is negative where c is, and 0
    where |1 + (n - 1) c| < 1e-6. Deviations from mergekit: weights, and no least product of norms
    (1e-6 there), so that small deltas count too.
    """

    filter_wise: bool = False

    @property
    def traits(self) -> Traits:
        return Traits(coordinate_symmetric=not self.filter_wise)

    def vectors(self, tensors: Tensor) -> Tensor:
        return along_rows(tensors) if self.filter_wise else super().vectors(tensors)

    def coefficients(self, lengths: Tensor, cosines: Tensor, weights: Tensor) -> Tensor:
        n = len(weights)
        c = cosines.triu(1).sum((1, 2), keepdim=True)[:, 0] / max(1, n * (n - 1) / 2)
        below = 1 + (n - 1) * c
        t = (n * c / below).masked_fill(below.abs() < 1e-6, 0)
        return weights * (t if n > 1 else t + 1)
