"""SCE: select, calculate, erase (arXiv 2408.07990), as in mergekit."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

from deltafl.rules.rule import RULES, Tensor, TensorRule, Traits, Within
from deltafl.rules.weighted import weighted_sum


@RULES.register("sce")
@dataclass(frozen=True)
class SCE(TensorRule):
    """R = sum_{agree} w_i delta_i / sum_{agree} w_i by tensor, w_i = p_i mean(delta_i^2).

    Before, where `select_topk` < 1, only coordinates with the k largest variances over the models
    are kept, k = select_topk times the number of variances that are not 0, rounded down, of equal
    ones the first. delta_i agrees where its sign is that of sum_i p_i delta_i, + if that is 0. As
    in mergekit w_i = p_i where the mean squares sum to less than 1e-6, as of most language models.
    """

    select_topk: Annotated[float, Within(0, 1)] = 1.0

    values: ClassVar = {"select_topk": [0.1, 1.0]}

    @property
    def traits(self) -> Traits:
        return Traits(fixed_point=self.select_topk == 1, odd=False)

    def combine(self, tensors: Tensor, weights: Sequence[float]) -> Tensor:
        deltas = tensors.reshape(len(tensors), -1)
        if self.select_topk < 1:
            variances = deltas.double().var(0, correction=0)
            kept = int(self.select_topk * int(variances.count_nonzero()))
            least = variances.sort(descending=True, stable=True)
            deltas[:, least.indices[kept:]] = 0
        energies = [float(row.double().square().mean()) for row in deltas]
        small = sum(energies) < 1e-6
        w = [p * (1 if small else energy) for p, energy in zip(weights, energies, strict=True)]
        w = [one / sum(w) for one in w]
        elected = weighted_sum(deltas, weights).sign_()
        elected.masked_fill_(elected == 0, 1.0)
        agreeing = deltas.mul_(elected).clamp_min_(0.0)
        merged = weighted_sum(agreeing, w).mul_(elected)
        merged /= weighted_sum(agreeing.sign_(), w).clamp_min_(1e-6)
        return merged.reshape(tensors.shape[1:])
