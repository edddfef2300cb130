"""Iso-CTS (arXiv 2502.04959): a flat spectrum over common and task-specific directions."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from deltafl.rules.matrices import MatrixRule, joined, triples
from deltafl.rules.rule import RULES, Tensor, Within
from deltafl.rules.weighted import weighted_sum


@RULES.register("iso_cts")
@dataclass(frozen=True)
class IsoCTS(MatrixRule):
    """R = mean(S) o(U) o(V)^T; U, S, V: c common singular triples and s of each model.

    Common: the c leading ones of D = sum_i p_i delta_i; of a model: the s leading ones of
    (I - U_c U_c^T) p_i delta_i. s = (r - c) / n rounded, for r = min(out, in) and
    c = `common_fraction` r, which takes what the rounding leaves; o(A) = A (A^T A)^-1/2. Deviations
    as in iso_c.
    """

    common_fraction: Annotated[float, Within(0, 1)] = 0.8

    def merged(self, matrices: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
        size, n = min(matrices[0].shape), len(matrices)
        own = min(round((size - int(size * self.common_fraction)) / n), size // n)
        wide = [m.double() * w for m, w in zip(matrices, weights, strict=True)]
        common = triples(weighted_sum(wide, [1.0] * n), size - n * own)
        u = common[0]
        parts = [common, *(triples(part - u @ (u.mT @ part), own) for part in wide)]
        u, s, v = joined(parts)
        return u * s.mean() @ v.mT
