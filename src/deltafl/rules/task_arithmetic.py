"""Task arithmetic (arXiv 2212.04089): the plain mean of the deltas."""

from dataclasses import dataclass

from deltafl.rules.rule import RULES, LinearRule, Stats, Tensor, Traits


@RULES.register("task_arithmetic")
@dataclass(frozen=True)
class TaskArithmetic(LinearRule):
    """c_i = p_i, which is 1/n with equal weights.

    The paper and its code sum: lambda * sum_i delta_i.
    """

    traits = Traits(native_scale="sum")

    def coefficients(self, stats: Stats, weights: Tensor) -> Tensor:
        return weights
