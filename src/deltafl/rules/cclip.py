"""Centered clipping (arXiv 2012.10333)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from deltafl.errors import DeltaflError
from deltafl.rules.rule import NO_TRANSFORMS, RULES, Stats, Traits

if TYPE_CHECKING:
    from torch import Tensor


@RULES.register("cclip")
@dataclass(frozen=True)
class CClip:
    """v <- v + sum_i p_i clip(delta_i - v, rho), clip(x, rho) = x min(1, rho / ||x||), from v = 0.

    One iteration (the form of arXiv 2411.18607) is c_i = p_i min(1, rho / ||delta_i||). v stays a combination of the
    deltas, so every norm comes from the Gram matrix. `unit`: rho is an "absolute" norm, or a "quantile" in [0, 1] of
    the norms of the deltas of weight above 0. A zero delta has factor 1.
    """

    rho: float
    unit: Literal["absolute", "quantile"] = "absolute"
    iterations: int = 1

    traits = Traits(fixed_point=False, native_scale="sum")
    transforms = NO_TRANSFORMS
    needs_gram = True

    def __post_init__(self) -> None:
        if self.unit not in ("absolute", "quantile"):
            raise DeltaflError(f'cclip: unit is "{self.unit}"; it must be absolute or quantile')
        if not self.rho >= 0 or (self.unit == "quantile" and self.rho > 1):
            raise DeltaflError(
                f"cclip: rho is {self.rho:g}; it must be >= 0, and at most 1 as a quantile"
            )
        if self.iterations < 1:
            raise DeltaflError(f"cclip: iterations is {self.iterations}; it must be 1 or more")

    @classmethod
    def examples(cls) -> Iterable[CClip]:
        return (cls(1.0), cls(0.5, "quantile"), cls(0.5, "quantile", iterations=3))

    def coefficients(self, stats: Stats, weights: Tensor) -> Tensor:
        gram = stats.gram
        assert gram is not None
        norms = gram.diagonal()[weights > 0].sqrt()
        radius = norms.quantile(self.rho) if self.unit == "quantile" else self.rho
        centre = weights * 0
        for _ in range(self.iterations):
            squares = gram.diagonal() - 2 * (gram @ centre) + centre @ gram @ centre
            norms = squares.clamp_min(0).sqrt()
            factors = weights * ((norms * 0 + radius) / norms).nan_to_num(
                nan=1.0, posinf=1.0
            ).clamp_max(1.0)
            centre = centre * (1 - factors.sum()) + factors
        return centre
