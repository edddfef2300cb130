"""WUDI-Merging (arXiv 2503.08099) as one ridge regression."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal

from deltafl.rules.matrices import MatrixRule
from deltafl.rules.regression import regressed
from deltafl.rules.rule import RULES, Tensor, Traits, Within


@RULES.register("wudi")
@dataclass(frozen=True)
class Wudi(MatrixRule):
    """argmin_R sum_i p_i ||(R - delta_i) delta_i^T||^2 / ||delta_i||^2 + lambda ||R - P||^2.

    R = (sum_i p_i delta_i K_i + lambda P) (sum_i p_i K_i + lambda I)^-1 for matrices (out, in),
    with K_i = delta_i^T delta_i / ||delta_i||^2: the rows of a delta are combinations of the inputs
    that it was trained on, for which K_i stands. lambda = `ridge` times the mean diagonal of
    sum_i p_i K_i. `prior`: P is the "mean" sum_i p_i delta_i, which needs no coefficient
    (server_lr 1), or n times that, the "sum", as the whole R then is (R / n is returned). Deviation:
    the paper starts at the sum and ends early, after 300 steps of Adam; its exact minimum (ridge 0)
    is useless.
    """

    ridge: Annotated[float, Within(0)] = 1.0
    prior: Literal["mean", "sum"] = "mean"

    values: ClassVar = {"prior": ["mean", "sum"]}

    @property
    def traits(self) -> Traits:
        mean = self.prior == "mean"
        return Traits(mean, coordinate_symmetric=False, native_scale=self.prior)

    def merged(self, matrices: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
        import torch

        out, size = matrices[0].shape
        if (total := len(matrices) * out) < size:  # in the space of the deltas' rows
            basis, rows = torch.linalg.qr(torch.cat(list(matrices)).double().mT)
            small = replace(self, ridge=self.ridge * total / size)
            return small.merged(rows.mT.split(out), weights) @ basis.mT
        gram = cross = mean = matrices[0].new_zeros(()).double()
        for matrix, weight in zip(matrices, weights, strict=True):
            delta = matrix.double()
            own = delta.mT @ delta * (weight / delta.square().sum().clamp_min(1e-300))
            gram, cross, mean = gram + own, cross + delta @ own, mean + delta * weight
        scale = len(matrices) if self.prior == "sum" else 1
        solution, _ = regressed(cross, gram, mean * scale, self.ridge)
        return solution / scale
