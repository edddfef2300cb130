"""DELLA (arXiv 2406.11617): drop small coordinates more often than large ones, elect, merge."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

from deltafl.rules.dare import LEVELS, Rescale, SparseRule, thinned
from deltafl.rules.rule import RULES, Rule, Source, Tensor, Threshold, Transform, Within
from deltafl.rules.ties import Elect
from deltafl.rules.weights import PerModel, number_of, numbers_of

ELECT = Elect()


@dataclass(frozen=True)
class Prune(Transform):
    """`thinned` by the ranks of magnitudes in each row, see `Della`."""

    kept: PerModel
    epsilon: PerModel
    seed: int
    rescale: Rescale

    whole = True

    def apply(
        self, block: Tensor, model: int, name: str, start: int, threshold: Threshold
    ) -> Tensor:
        density, epsilon = (number_of(v, name, model) for v in (self.kept, self.epsilon))
        if density in (0, 1):
            return block.mul_(density)
        rows = block if block.dim() > 1 else block.reshape(1, -1)
        ranks = rows.abs().argsort(dim=1, stable=True).argsort(dim=1).double()
        places = ranks.mul_(2 / max(1, rows.shape[1] - 1)).sub_(float(rows.shape[1] > 1))
        cut = ((1 - density - epsilon * places) * LEVELS).round_().clamp_max_(LEVELS - 1)
        key = f"{self.seed}/{model}/{name}"
        return thinned(block, cut.view(block.shape), key, self.rescale)


@RULES.register("della")
@dataclass(frozen=True)
class Della(SparseRule):
    """R = the rule `inner` (elect by default) of deltas that are dropped by magnitude.

    The coordinate of rank r = 0 .. k - 1 by magnitude in its row of k, along the second dimension
    of its tensor (a vector is one row), is kept with probability density - epsilon + 2 epsilon r /
    (k - 1), in a row of one with `density`; of density 1 all, of density 0 nothing. What is kept is
    multiplied by sum|delta| / sum|kept| of its tensor, as in mergekit; with `rescale`
    "probability", as in the paper, divided by that of its own.
    """

    density: Annotated[PerModel, Within(0, 1)]
    epsilon: Annotated[PerModel, Within(0, 1)] = 0.15
    inner: Rule = ELECT
    seed: int = 0
    rescale: Rescale = "l1"

    values: ClassVar = {"density": 0.5}

    @property
    def sparsify(self) -> Transform:
        return Prune(self.density, self.epsilon, self.seed, self.rescale)

    def problems(self, sources: Sequence[Source]) -> list[str]:
        told, n = super().problems(sources), len(sources)
        patterns = [
            p for v in (self.density, self.epsilon) if not isinstance(v, float | int) for p in v
        ]
        for name in patterns or ["*"]:
            told += [
                f"della: density {d:g} with epsilon {e:g}: epsilon must be less than density and "
                "than 1 - density"
                for d, e in zip(
                    *(numbers_of(v, name, n) for v in (self.density, self.epsilon)), strict=False
                )
                if 0 < d < 1 and e >= min(d, 1 - d)
            ]
        return [*dict.fromkeys(told)]
