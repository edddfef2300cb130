"""Takes over the coordinates of a model that change its weights' softmax most, as arcee_fusion."""

from collections.abc import Sequence
from dataclasses import dataclass

from deltafl.rules.rule import RULES, Tensor, TensorRule, Traits


@RULES.register("arcee_fusion")
@dataclass(frozen=True)
class ArceeFusion(TensorRule):
    """R = delta where s >= median(s) + 1.5 (q3(s) - q1(s)) of its tensor, else 0.

    s = |delta| sum_row p log(p / q), where p and q are 1e-8 plus the softmax, over a row of the
    last dimension, of the model's weights and of the base's. Deviation from mergekit: exact
    quantiles of large tensors, too, whose values are drawn at random there.
    """

    space = "weights"
    num_models = 1
    traits = Traits(fixed_point=False, odd=False, coordinate_symmetric=False)

    def combine(self, tensors: Tensor, weights: Sequence[float]) -> Tensor:
        base, tuned = tensors
        delta = tuned - base
        p, q = tuned.softmax(-1).add_(1e-8), base.softmax(-1).add_(1e-8)
        scores = delta.abs() * (p * (p / q).log()).sum(-1, keepdim=True)
        ordered = scores.flatten().sort().values
        low, middle, high = (ordered[(len(ordered) - 1) * part // 4] for part in (1, 2, 3))
        return base + delta * (scores >= middle + 1.5 * (high - low))
