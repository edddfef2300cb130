"""Iso-C (arXiv 2502.04959): the sum of deltas with a flat spectrum."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

from deltafl.rules.matrices import MatrixRule, triples
from deltafl.rules.rule import RULES, Tensor, Within
from deltafl.rules.weighted import weighted_sum


@RULES.register("iso_c")
@dataclass(frozen=True)
class IsoC(MatrixRule):
    """R = mean(s) / mean(s^power) U diag(s^power) V^T, with U diag(s) V^T = sum_i p_i delta_i.

    Power 0 is the paper's; 1 is task arithmetic; between them the spectrum is less flat.
    Deviations: the power; singular values that are 0 stay so and do not count in the means; dense
    convolutions are matrices here, and are averaged in the paper's code.
    """

    power: Annotated[float, Within(0, 1)] = 0.0

    values: ClassVar = {"power": [0.0, 0.5]}

    def merged(self, matrices: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
        u, s, v = triples(weighted_sum([m.double() for m in matrices], weights))
        bent = s**self.power
        return u * (bent * (s.mean() / bent.mean())) @ v.mT
