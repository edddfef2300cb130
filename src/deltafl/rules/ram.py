"""Reinforced Agent Merging (arXiv 2601.13572), as mergekit's ram."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from deltafl.rules.rule import RULES, CoordinateRule, Tensor, Traits, Within
from deltafl.rules.weighted import weighted_sum


@RULES.register("ram")
@dataclass(frozen=True)
class RAM(CoordinateRule):
    """R = the mean of the deltas that move: sum_i p_i m_i delta_i / sum_i p_i m_i by coordinate.

    m_i = |delta_i| > epsilon. What one model alone moves is kept in full.
    """

    epsilon: Annotated[float, Within(0)] = 1e-5

    traits = Traits(fixed_point=False)

    def combine(self, block: Tensor, weights: Sequence[float]) -> Tensor:
        moved = (block.abs() > self.epsilon).to(block.dtype)
        merged = weighted_sum(block.mul_(moved), weights)
        return merged.div_(weighted_sum(moved, weights).clamp_min_(1e-12))
