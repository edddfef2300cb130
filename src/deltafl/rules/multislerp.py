"""Directions of any number of models averaged on the sphere, as mergekit's multislerp."""

from dataclasses import dataclass
from typing import Literal

from deltafl.rules.directions import DirectionRule
from deltafl.rules.rule import RULES, Tensor, Traits


@RULES.register("multislerp")
@dataclass(frozen=True)
class MultiSlerp(DirectionRule):
    """R = (sum_i p_i |v_i|) m / |m| by tensor, m = sum_i p_i v_i / |v_i|: means of both.

    v: the deltas, or whole weights. That is what mergekit's exponential map gives, whose tangent
    vectors sum to 0. Where |m| < 1e-8 the v are averaged; mergekit refuses that for more than two.
    """

    space: Literal["deltas", "weights"] = "deltas"

    @property
    def traits(self) -> Traits:
        return Traits(odd=self.space == "deltas")

    def coefficients(self, lengths: Tensor, cosines: Tensor, weights: Tensor) -> Tensor:
        norms = norm(weights.expand(lengths.shape), cosines)
        scales = (lengths @ weights)[:, None] / norms / lengths.masked_fill(lengths == 0, 1)
        return weights * scales.masked_fill(norms < 1e-8, 1)


def norm(b: Tensor, cosines: Tensor) -> Tensor:
    """Of the sum of unit vectors with coefficients b, (r, n) -> (r, 1)."""
    return (b[:, None] @ cosines @ b[:, :, None])[:, 0].clamp_min(0).sqrt()
