"""FedGMA (arXiv 2201.11986): soften the coordinates on whose sign the models disagree."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from deltafl.rules.rule import NO_TRANSFORMS, RULES, Traits, in_range
from deltafl.rules.weighted import weighted_sum

if TYPE_CHECKING:
    from torch import Tensor


@RULES.register("fedgma")
@dataclass(frozen=True)
class FedGMA:
    """R = m * sum_i p_i delta_i, A = |sum_i p_i sign(delta_i)|, m = 1 where A >= rho, else A.

    With equal weights A = |sum_i sign| / n is compared in integers, |sum_i sign| >= ceil(n rho - 1e-9): in floats
    the comparison goes wrong, for n = 10 for example.
    """

    rho: float

    traits = Traits(native_scale="sum")
    transforms = NO_TRANSFORMS

    def __post_init__(self) -> None:
        in_range("fedgma", "rho", self.rho, 0, 1)

    @classmethod
    def examples(cls) -> Iterable[FedGMA]:
        return (cls(0.0), cls(0.6), cls(1.0))

    def combine(self, block: Tensor, weights: Sequence[float]) -> Tensor:
        n = len(weights)
        mean = weighted_sum(block, weights)
        if len(set(weights)) == 1:
            votes = weighted_sum(block.sign_(), [1.0] * n).abs_()
            agree = (votes - (math.ceil(n * self.rho - 1e-9) - 1)).clamp_(0.0, 1.0)
            return mean.mul_(votes.div_(n).maximum(agree))
        agreement = weighted_sum(block.sign_(), weights).abs()
        return mean * agreement.masked_fill_(agreement >= self.rho - 1e-6, 1.0)
