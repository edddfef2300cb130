"""Spherical interpolation between two models, as mergekit's nuslerp."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from deltafl.rules.directions import DirectionRule, along_rows, arc
from deltafl.rules.rule import RULES, Tensor, Traits

STRAIGHT = 1 - 1e-12
"""Above, arc and straight line differ by less than 1e-12 of their length."""


@RULES.register("nuslerp")
@dataclass(frozen=True)
class NuSlerp(DirectionRule):
    """R = (sin(p_1 a) delta_1 + sin(p_2 a) delta_2) / sin(a), a the angle between the two.

    space: deltas or whole weights. per: one angle for each tensor, for each row (W[i, :], by the
    last dimension) or for each column (W[:, j], by the first). Parallel deltas are averaged.
    """

    space: Literal["deltas", "weights"] = "deltas"
    per: Literal["tensor", "row", "column"] = "tensor"

    num_models = 2

    @property
    def traits(self) -> Traits:
        return Traits(odd=self.space == "deltas", coordinate_symmetric=self.per == "tensor")

    def vectors(self, tensors: Tensor) -> Tensor:
        return super().vectors(tensors) if self.per == "tensor" else along_rows(tensors)

    def coefficients(self, lengths: Tensor, cosines: Tensor, weights: Tensor) -> Tensor:
        if len(weights) == 1:
            return weights.expand(lengths.shape)
        return arc(cosines[:, 0, 1], weights, STRAIGHT)

    def combine(self, tensors: Tensor, weights: Sequence[float]) -> Tensor:
        if self.per != "column" or tensors.dim() < 3:
            return super().combine(tensors, weights)
        return super().combine(tensors.transpose(1, -1), weights).transpose(0, -1)
