"""FedGMA (arXiv 2201.11986): soften the coordinates on whose sign the models disagree."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

from deltafl.rules.rule import RULES, CoordinateRule, Tensor, Traits, Within
from deltafl.rules.weighted import weighted_sum


@RULES.register("fedgma")
@dataclass(frozen=True)
class FedGMA(CoordinateRule):
    """R = m * sum_i p_i delta_i, A = |sum_i p_i sign(delta_i)|, m = 1 where A >= rho, else A.

    With equal weights A = |sum_i sign| / n is compared in integers, |sum_i sign| >=
    ceil(n rho - 1e-9): in floats the comparison goes wrong, for n = 10 for example. A search tries
    the paper's grid, rho in 0.1 .. 0.9.
    """

    rho: Annotated[float, Within(0, 1)]

    traits = Traits(native_scale="sum")
    values: ClassVar = {"rho": [0.3, 0.6, 0.9]}

    @classmethod
    def grid(cls, given: Mapping[str, object], norms: Sequence[float]) -> Mapping[str, object]:
        return {"rho": [round(0.1 * i, 1) for i in range(1, 10)]}

    def combine(self, block: Tensor, weights: Sequence[float]) -> Tensor:
        n = len(weights)
        mean = weighted_sum(block, weights)
        if len(set(weights)) == 1:
            votes = weighted_sum(block.sign_(), [1.0] * n).abs_()
            agree = (votes - (math.ceil(n * self.rho - 1e-9) - 1)).clamp_(0.0, 1.0)
            return mean.mul_(votes.div_(n).maximum(agree))
        agreement = weighted_sum(block.sign_(), weights).abs()
        return mean * agreement.masked_fill_(agreement >= self.rho - 1e-6, 1.0)
