"""Task arithmetic (arXiv 2212.04089): the plain mean of the deltas."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from deltafl.rules.rule import NO_TRANSFORMS, RULES, Stats, Traits

if TYPE_CHECKING:
    from torch import Tensor


@RULES.register("task_arithmetic")
@dataclass(frozen=True)
class TaskArithmetic:
    """c_i = p_i, which is 1/n with equal weights. The paper and its code sum: lambda * sum_i delta_i."""

    traits = Traits(native_scale="sum")
    transforms = NO_TRANSFORMS
    needs_gram = False

    @classmethod
    def examples(cls) -> Iterable[TaskArithmetic]:
        return (cls(),)

    def coefficients(self, stats: Stats, weights: Tensor) -> Tensor:
        return weights
