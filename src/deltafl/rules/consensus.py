"""Consensus merging with TALL masks (arXiv 2405.07813)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

from deltafl.rules.rule import RULES, CoordinateRule, Tensor, Traits, Within
from deltafl.rules.weighted import weighted_sum


@RULES.register("consensus")
@dataclass(frozen=True)
class Consensus(CoordinateRule):
    """R = D [sum_i m_i >= min_models], D = sum_i p_i delta_i: what only few models need is dropped.

    m_i = |p_i delta_i| >= mask_threshold |D - p_i delta_i|, for all models one threshold (the paper
    chooses one for each), less a millionth of it, so that rounding decides nothing. Of fewer models
    of weight above 0 than `min_models` all must agree.
    """

    mask_threshold: Annotated[float, Within(0)] = 0.4
    min_models: Annotated[int, Within(0)] = 2

    traits = Traits(fixed_point=False, native_scale="sum")
    values: ClassVar = {"mask_threshold": [0.2, 0.4, 0.6]}
    searched = values

    def combine(self, block: Tensor, weights: Sequence[float]) -> Tensor:
        merged = weighted_sum(block, weights)
        parts = block * block.new_tensor(weights)[:, None]
        needed = parts.abs() >= (merged - parts).abs_() * (self.mask_threshold * (1 - 1e-6))
        return merged.mul_(needed.sum(0) >= min(self.min_models, len(weights)))
