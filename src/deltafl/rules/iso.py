"""Iso-C and Iso-CTS (arXiv 2502.04959): sums of deltas with a flat spectrum."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

from deltafl.rules.matrices import MatrixRule, joined, triples
from deltafl.rules.rule import RULES, Tensor, Within
from deltafl.rules.weighted import weighted_sum


@RULES.register("iso_c")
@dataclass(frozen=True)
class IsoC(MatrixRule):
    """R = mean(s) / mean(s^power) U diag(s^power) V^T, with U diag(s) V^T = sum_i p_i delta_i.

    Power 0 is the paper's; 1 is task arithmetic; between them the spectrum is less flat.
    Deviations: the power; singular values that are 0 stay so and do not count in the means; kernels
    of dense convolutions are matrices, which the paper's code averages.
    """

    power: Annotated[float, Within(0, 1)] = 0.0

    values: ClassVar = {"power": [0.0, 0.5]}
    searched = values

    def merged(self, matrices: Tensor, weights: Sequence[float]) -> Tensor:
        u, s, v = triples(weighted_sum(matrices, weights))
        bent = s**self.power
        return u * (bent * (s.mean() / bent.mean())) @ v.mT


@RULES.register("iso_cts")
@dataclass(frozen=True)
class IsoCTS(MatrixRule):
    """R = mean(S) o(U) o(V)^T; U, S, V: c common singular triples and s of each model.

    Common: the c leading ones of sum_i p_i delta_i; of a model: the s leading ones of
    (I - U_c U_c^T) p_i delta_i, U_c the common u. For r = min(out, in) and n models s is
    (1 - common_fraction) r / n, rounded, and c = r - n s. o(A) = A (A^T A)^-1/2. Deviations as in
    iso_c.
    """

    common_fraction: Annotated[float, Within(0, 1)] = 0.8

    def merged(self, matrices: Tensor, weights: Sequence[float]) -> Tensor:
        size, n = min(matrices.shape[1:]), len(matrices)
        own = min(round((size - int(size * self.common_fraction)) / n), size // n)
        common = triples(weighted_sum(matrices, weights), size - n * own)
        u = common[0]
        scaled = (m * w for m, w in zip(matrices, weights, strict=True))
        u, s, v = joined([common, *(triples(m - u @ (u.mT @ m), own) for m in scaled)])
        return u * s.mean() @ v.mT
