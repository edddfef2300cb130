"""TIES-Merging (arXiv 2306.01708): trim, elect a sign, merge what agrees with it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from deltafl.rules.rule import (
    RULES,
    CoordinateRule,
    Source,
    Tensor,
    Threshold,
    Traits,
    Transform,
    Within,
)
from deltafl.rules.weighted import weighted_sum
from deltafl.rules.weights import PerModel


@dataclass(frozen=True)
class Trim(Transform):
    """Keep the `density` fraction largest in magnitude, of equal ones the first."""

    density: PerModel | None
    per_tensor: bool

    def apply(
        self, block: Tensor, model: int, name: str, start: int, threshold: Threshold
    ) -> Tensor:
        value, first = threshold.value, max(0, threshold.stop - start)
        if block.itemsize != 4:
            magnitudes = block.abs().float()
            dropped = magnitudes < value
            dropped[first:] |= magnitudes[first:] == value
            return block.masked_fill_(dropped, 0.0)
        below = float(block.new_tensor(value).nextafter(block.new_zeros(())))
        if first in range(1, len(block)):
            block[:first] = block[:first].hardshrink(below)
            block[first:] = block[first:].hardshrink(value)
            return block
        return block.hardshrink(below if first else value)  # it is fast, and keeps what is greater


@RULES.register("elect")
@dataclass(frozen=True)
class Elect(CoordinateRule):
    """s = sign(sum_i p_i delta_i); merge the deltas whose sign is s: `ties` that trims nothing.

    For other rules to wrap: parameters are those of `ties`.
    """

    merge: Literal["mean", "sum"] = "mean"
    zero_sum: Literal["none", "positive"] = "none"

    @property
    def traits(self) -> Traits:
        return Traits(odd=self.zero_sum == "none")

    def combine(self, block: Tensor, weights: Sequence[float]) -> Tensor:
        least = min(weights)
        elected = weighted_sum(block, [round(w / least, 9) for w in weights]).sign_()
        if self.zero_sum == "positive":
            elected.masked_fill_(elected == 0, 1.0)
        agreeing = block.mul_(elected).clamp_min_(0.0)
        merged = weighted_sum(agreeing, weights)
        if self.merge == "mean":
            merged /= weighted_sum(agreeing.sign_(), weights).clamp_min_(1e-12)
        return merged.mul_(elected)


@RULES.register("ties")
@dataclass(frozen=True)
class Ties(CoordinateRule):
    """Trim each delta to `density`; s = sign(sum_i p_i delta_i); merge the deltas whose sign is s.

    merge "mean" (the paper): sum_{agree} p_i delta_i / sum_{agree} p_i; "sum": sum_{agree} p_i
    delta_i. A zero sum elects nothing: no update; with zero_sum "positive", as in mergekit, it
    elects +. The threshold is over the whole delta, or `per_tensor`, and of what equals it the
    first are kept, so that k = int(density size), at least 1, are; `density` may be one for each
    model, and then by tensor. The election counts weights in units of the least one, so that with
    equal weights (or small integer ratios) deltas that cancel sum to exactly 0.
    """

    density: Annotated[PerModel, Within(0, 1)] = 0.2
    merge: Literal["mean", "sum"] = "mean"
    per_tensor: bool = False
    zero_sum: Literal["none", "positive"] = "none"

    values: ClassVar = {"density": [0.2, 0.5]}

    @property
    def traits(self) -> Traits:
        by_model = isinstance(self.density, Mapping)
        return Traits(
            fixed_point=self.density == 1, odd=self.zero_sum == "none", order_free=not by_model
        )

    @property
    def transforms(self) -> tuple[Transform, ...]:
        return () if self.density == 1 else (Trim(self.density, self.per_tensor),)

    def problems(self, sources: Sequence[Source]) -> list[str]:
        by_tensor = isinstance(self.density, Mapping) and len(self.density) > 1
        wrong = ["ties: density by tensor needs per_tensor"]
        return super().problems(sources) + wrong * (by_tensor and not self.per_tensor)

    def combine(self, block: Tensor, weights: Sequence[float]) -> Tensor:
        return Elect(self.merge, self.zero_sum).combine(block, weights)
