"""Spherical interpolation of whole weights between the base and a model, as mergekit's slerp."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

from deltafl.rules.directions import DirectionRule, arc
from deltafl.rules.rule import RULES, Tensor, Traits, Within
from deltafl.rules.weights import PerModel, number_of

STRAIGHT = 0.9995


@RULES.register("slerp")
@dataclass(frozen=True)
class Slerp(DirectionRule):
    """theta = (sin((1 - t) a) theta_0 + sin(t a) theta_1) / sin(a), a the angle of the tensors.

    t = 0 is the base, t = 1 the model. Where |cos a| > 0.9995, as of most fine-tunes of a base,
    (1 - t) theta_0 + t theta_1. `t` may be one number, or one by tensor: {pattern: [t]}.
    """

    t: Annotated[PerModel, Within(-1e3, 1e3)]

    space = "weights"
    num_models = 1
    traits = Traits(fixed_point=False, odd=False)
    values: ClassVar = {"t": 0.5}

    def at(self, name: str) -> "Slerp":
        return replace(self, t=number_of(self.t, name))

    def coefficients(self, lengths: Tensor, cosines: Tensor, weights: Tensor) -> Tensor:
        return arc(cosines[:, 0, 1], weights, STRAIGHT)

    def combine(self, tensors: Tensor, weights: Sequence[float]) -> Tensor:
        assert isinstance(self.t, float | int)
        return super().combine(tensors, [1 - self.t, self.t])
