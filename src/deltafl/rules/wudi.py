"""WUDI-Merging (arXiv 2503.08099) as one ridge regression."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal

from deltafl.rules.matrices import MatrixRule
from deltafl.rules.regression import regressed
from deltafl.rules.rule import RULES, Tensor, Traits, Within
from deltafl.rules.weighted import weighted_sum


@RULES.register("wudi")
@dataclass(frozen=True)
class Wudi(MatrixRule):
    """argmin_R sum_i p_i ||(R - delta_i) delta_i^T||^2 / ||delta_i||^2 + lambda ||R - P||^2.

    R = (sum_i p_i delta_i K_i + lambda P) (sum_i p_i K_i + lambda I)^-1 for matrices (out, in),
    with K_i = delta_i^T delta_i / ||delta_i||^2: the rows of a delta are combinations of the inputs
    that it was trained on, for which K_i stands. lambda = `ridge` times the mean diagonal of
    sum_i p_i K_i. `prior`: P is the "mean" sum_i p_i delta_i, which needs no coefficient
    (server_lr 1), or n times that, the "sum"; the whole R then is a sum, and R / n is returned.
    Deviation: the paper starts at the sum and ends early, after 300 steps of Adam; its exact
    minimum (ridge 0) is useless.
    """

    ridge: Annotated[float, Within(0)] = 1.0
    prior: Literal["mean", "sum"] = "mean"

    values: ClassVar = {"prior": ["mean", "sum"]}
    searched = values

    @property
    def traits(self) -> Traits:
        return Traits(self.prior == "mean", coordinate_symmetric=False, native_scale=self.prior)

    def merged(self, matrices: Tensor, weights: Sequence[float]) -> Tensor:
        import torch

        n, out, size = matrices.shape
        if n * out < size:  # in the space of the deltas' rows
            basis, rows = torch.linalg.qr(matrices.flatten(0, 1).mT)
            small = replace(self, ridge=self.ridge * n * out / size)
            return small.merged(rows.mT.reshape(n, out, -1), weights) @ basis.mT
        gram, cross = matrices.new_zeros(size, size), matrices.new_zeros(out, size)
        for delta, weight in zip(matrices, weights, strict=True):
            own = delta.mT @ delta * (weight / delta.square().sum().clamp_min(1e-300))
            gram += own
            cross += delta @ own
        scale = n if self.prior == "sum" else 1
        prior = weighted_sum(matrices, weights) * scale
        return regressed(cross, gram, prior, self.ridge)[0] / scale
