"""KnOTS (arXiv 2410.19735): a rule of coordinates in the basis that all models share."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from deltafl.rules.matrices import MatrixRule, triples
from deltafl.rules.rule import RULES, CoordinateRule, Rule, Source, Tensor, Traits
from deltafl.rules.ties import Ties


@RULES.register("knots")
@dataclass(frozen=True)
class Knots(MatrixRule):
    """R = U r(S V_1^T .. S V_n^T), with U S [V_1^T .. V_n^T] = [delta_1 .. delta_n].

    r is the rule `inner`, which combines coordinate by coordinate (ties by default) and trims each
    matrix on its own; it also combines what is no matrix. Directions whose singular value is 0 are
    left out.
    """

    inner: Rule = field(default_factory=Ties)

    @property
    def traits(self) -> Traits:
        return replace(self.inner.traits, coordinate_symmetric=False)

    def problems(self, sources: Sequence[Source]) -> list[str]:
        inner = self.inner
        if isinstance(inner, CoordinateRule) and inner.traits.odd and inner.traits.order_free:
            return inner.problems(sources)
        return [
            f"knots: inner is {inner.name}; it must combine coordinate by coordinate, alike for "
            "all models and either sign: ties, median, trimmed_mean, fedgma or consensus"
        ]

    def merged(self, matrices: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
        import torch

        u, s, v = triples(torch.cat(list(matrices), 1))
        parts = torch.stack((v * s).split(matrices[0].shape[1]))
        return u @ self.others(parts, weights).mT

    def others(self, tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
        import torch

        shape, size = tensors[0].shape, tensors[0].numel()
        if not size:
            return tensors[0]
        rows = torch.stack(list(tensors)).reshape(-1, size)
        for transform in self.inner.transforms:
            for i, row in enumerate(rows):
                kept = max(1, int(transform.density * size))
                threshold = row.abs().float().kthvalue(size - kept + 1).values
                rows[i] = transform.apply(row, i, "", 0, float(threshold))
        return self.inner.combine(rows, weights).reshape(shape)
