"""Centered clipping (arXiv 2012.10333)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from deltafl.rules.rule import RULES, LinearRule, Source, Stats, Tensor, Traits, Within

LEVELS = 10


@RULES.register("cclip")
@dataclass(frozen=True)
class CClip(LinearRule):
    """v <- v + sum_i p_i clip(delta_i - v, rho), clip(x, rho) = x min(1, rho / ||x||), from v = 0.

    One iteration (the form of arXiv 2411.18607) is c_i = p_i min(1, rho / ||delta_i||). v stays a
    combination of the deltas, so every norm comes from the Gram matrix. `unit`: rho is an
    "absolute" norm, or a "quantile" in [0, 1] of the norms of the deltas of weight above 0. A zero
    delta has factor 1. A search tries ten absolute values from the smallest norm to the largest,
    both included: the largest clips nothing.
    """

    rho: Annotated[float, Within(0)]
    unit: Literal["absolute", "quantile"] = "absolute"
    iterations: Annotated[int, Within(1)] = 1

    traits = Traits(fixed_point=False, native_scale="sum")
    needs_gram = True
    values: ClassVar = {"unit": "quantile", "rho": [0.0, 0.25, 0.5, 0.75, 1.0]}

    def problems(self, sources: Sequence[Source]) -> list[str]:
        wrong = self.unit == "quantile" and self.rho > 1
        return [f"cclip: rho is {self.rho:g}; as a quantile it is at most 1"] if wrong else []

    @classmethod
    def grid(cls, given: Mapping[str, object], norms: Sequence[float]) -> Mapping[str, object]:
        if given.get("unit", "absolute") != "absolute":
            return {}
        low, high = min(norms), max(norms)
        levels = [low + (high - low) * i / (LEVELS - 1) for i in range(LEVELS - 1)]
        return {"rho": [*levels, high * (1 + 1e-12)]}  # rounding must not clip the longest delta

    def coefficients(self, stats: Stats, weights: Tensor) -> Tensor:
        gram = stats.gram
        norms = gram.diagonal()[weights > 0].sqrt()
        radius = norms.quantile(self.rho) if self.unit == "quantile" else self.rho
        centre = weights * 0
        for _ in range(self.iterations):
            squares = gram.diagonal() - 2 * (gram @ centre) + centre @ gram @ centre
            norms = squares.clamp_min(0).sqrt()
            shrink = ((norms * 0 + radius) / norms).nan_to_num(nan=1.0, posinf=1.0)
            factors = weights * shrink.clamp_max(1.0)
            centre = centre * (1 - factors.sum()) + factors
        return centre
