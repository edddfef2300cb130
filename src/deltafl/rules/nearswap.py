"""Moves the base towards a model by a bounded step, as mergekit's nearswap."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

from deltafl.rules.rule import RULES, CoordinateRule, Tensor, Traits, Within
from deltafl.rules.weights import PerModel, number_of


@RULES.register("nearswap")
@dataclass(frozen=True)
class NearSwap(CoordinateRule):
    """R = max(-t, min(t, delta)) by coordinate; `t` may be one number by tensor: {pattern: [t]}."""

    t: Annotated[PerModel, Within(0)]

    num_models = 1
    traits = Traits(fixed_point=False)
    values: ClassVar = {"t": 0.001}

    def at(self, name: str) -> "NearSwap":
        return replace(self, t=number_of(self.t, name))

    def combine(self, block: Tensor, weights: Sequence[float]) -> Tensor:
        assert isinstance(self.t, float | int)
        return block[0].clamp_(-self.t, self.t)
