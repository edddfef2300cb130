"""Consensus merging with TALL masks (arXiv 2405.07813)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from deltafl.rules.rule import RULES, CoordinateRule, Tensor, Traits, Within
from deltafl.rules.weighted import weighted_sum


@RULES.register("consensus")
@dataclass(frozen=True)
class Consensus(CoordinateRule):
    """R = D [sum_i m_i >= min_models], D = sum_i p_i delta_i: what only few models need is dropped.

    m_i = |p_i delta_i| >= mask_threshold |D - p_i delta_i|, for all models one threshold (the paper
    chooses one for each), less 1e-6, so that rounding decides nothing. Of fewer than `min_models`
    models of weight above 0 all must agree.
    """

    mask_threshold: Annotated[float, Within(0)] = 0.4
    min_models: Annotated[int, Within(0)] = 2

    traits = Traits(fixed_point=False, native_scale="sum")
    values: ClassVar = {"mask_threshold": [0.2, 0.4, 0.6]}

    @classmethod
    def grid(cls, given: Mapping[str, Any], norms: Sequence[float]) -> Mapping[str, Any]:
        return cls.values

    def combine(self, block: Tensor, weights: Sequence[float]) -> Tensor:
        merged = weighted_sum(block, weights)
        votes = merged * 0
        counted = [(row, w) for row, w in zip(block, weights, strict=True) if w > 0]
        for row, weight in counted:
            part = row * weight
            votes += part.abs() >= (merged - part).abs_() * (self.mask_threshold - 1e-6)
        return merged.mul_(votes >= min(self.min_models, len(counted)))
