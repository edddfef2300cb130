"""Model Breadcrumbs (arXiv 2312.06795): drop the largest and the smallest of each delta, merge."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

from deltafl.rules.dare import MEAN, SparseRule
from deltafl.rules.ordering import largest
from deltafl.rules.rule import RULES, Rule, Tensor, Threshold, Traits, Transform, Within
from deltafl.rules.ties import Trim
from deltafl.rules.weights import PerModel, number_of


@dataclass(frozen=True)
class Crumbs(Transform):
    """Of each tensor of N keep the int(density N) largest but for the int(gamma N) largest."""

    kept: PerModel
    gamma: PerModel

    whole = True

    def apply(
        self, block: Tensor, model: int, name: str, start: int, threshold: Threshold
    ) -> Tensor:
        density, gamma = (number_of(v, name, model) for v in (self.kept, self.gamma))
        if density == 1:
            return block
        flat, trim = block.reshape(-1), Trim(None, True)
        count = int(density * len(flat))
        last = min(len(flat), count + int(gamma * len(flat)))
        upper = (
            trim.apply(flat.clone(), model, name, 0, largest(flat, k)) for k in (last, last - count)
        )
        return next(upper).sub_(next(upper)).view(block.shape)


@RULES.register("breadcrumbs")
@dataclass(frozen=True)
class Breadcrumbs(SparseRule):
    """R = the rule `inner` of deltas without the largest and the smallest of each tensor.

    Of N magnitudes the int(gamma N) largest are dropped and of the others the int(density N)
    largest kept, of equal ones the first; of fewer others, the smallest of all are kept. As in
    mergekit density 1 drops nothing, and nothing is rescaled.
    """

    density: Annotated[PerModel, Within(0, 1)]
    gamma: Annotated[PerModel, Within(0, 1)] = 0.01
    inner: Rule = MEAN

    values: ClassVar = {"density": 0.9}

    @property
    def traits(self) -> Traits:
        by_model = isinstance(self.density, Mapping) or isinstance(self.gamma, Mapping)
        inner = self.inner.traits
        return replace(inner, fixed_point=False, order_free=inner.order_free and not by_model)

    @property
    def sparsify(self) -> Transform:
        return Crumbs(self.density, self.gamma)
