"""KnOTS (arXiv 2410.19735): a rule of coordinates in the basis that all models share."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from deltafl.rules.matrices import MatrixRule, triples
from deltafl.rules.ordering import largest
from deltafl.rules.rule import RULES, CoordinateRule, Source, Tensor, Traits
from deltafl.rules.ties import Ties

TIES = Ties()


@RULES.register("knots")
@dataclass(frozen=True)
class Knots(MatrixRule):
    """R = U r(S V_1^T .. S V_n^T), with U S [V_1^T .. V_n^T] = [delta_1 .. delta_n].

    r is the rule `inner`, which combines coordinate by coordinate (ties by default) and trims each
    matrix on its own, to one value at least. Directions whose singular value is 0 are left out.
    """

    inner: CoordinateRule = TIES

    @property
    def traits(self) -> Traits:
        return replace(self.inner.traits, coordinate_symmetric=False)

    def problems(self, sources: Sequence[Source]) -> list[str]:
        inner = self.inner
        if isinstance(inner, CoordinateRule) and inner.traits.odd and inner.traits.order_free:
            return inner.problems(sources)
        return [
            f"knots: inner is {inner.name}; it must treat each coordinate, either sign and all "
            "models alike, as ties, median, trimmed_mean, fedgma and consensus do by default"
        ]

    def merged(self, matrices: Tensor, weights: Sequence[float]) -> Tensor:
        u, s, v = triples(matrices.mT.flatten(0, 1).mT)
        if not len(s):
            return matrices[0]
        rows = (v * s).reshape(len(matrices), -1)
        size = rows.shape[1]
        for transform in self.inner.transforms:
            for i, row in enumerate(rows):
                assert isinstance(transform.density, float | int)
                kept = max(1, int(transform.density * size))
                rows[i] = transform.apply(row, i, "", 0, largest(row, kept))
        return u @ self.inner.combine(rows, weights).reshape(-1, len(s)).mT
