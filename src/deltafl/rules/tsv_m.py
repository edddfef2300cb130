"""TSV-Merge (arXiv 2412.00081): the leading singular directions of each model, decorrelated."""

from collections.abc import Sequence
from dataclasses import dataclass

from deltafl.rules.matrices import MatrixRule, joined, triples
from deltafl.rules.rule import RULES, Tensor


@RULES.register("tsv_m")
@dataclass(frozen=True)
class TSVMerge(MatrixRule):
    """R = o(U) S o(V)^T; U, S, V: the k leading singular triples of each p_i delta_i, side by side.

    k = min(out, in) / n rounded down, at least 1; o(A) = A (A^T A)^-1/2. Deviations: triples whose
    singular value is 0, and directions that depend on others (of equal deltas), are left out, where
    the paper's code weighs arbitrary ones; dense convolutions are matrices here, and are averaged
    there.
    """

    def merged(self, matrices: Tensor, weights: Sequence[float]) -> Tensor:
        rank = max(1, min(matrices.shape[1:]) // len(matrices))
        parts = [triples(m * w, rank) for m, w in zip(matrices, weights, strict=True)]
        u, s, v = joined(parts)
        return u * s @ v.mT
