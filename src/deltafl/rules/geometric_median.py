"""Geometric median by smoothed Weiszfeld iterations (RFA, arXiv 1912.13445)."""

from dataclasses import dataclass
from typing import Annotated

from deltafl.rules.rule import RULES, LinearRule, Stats, Tensor, Within


@RULES.register("geometric_median")
@dataclass(frozen=True)
class GeometricMedian(LinearRule):
    """argmin_z sum_i p_i ||delta_i - z||, z = sum_i c_i delta_i.

    c_i is proportional to p_i / max(nu, ||delta_i - z||), nu = `smoothing` times the largest norm
    where p_i > 0 (RFA takes an absolute nu; a relative one serves every scale). Distances come from
    the Gram matrix. Ends after `iterations`, or when no coefficient moves by more than 1e-12.
    """

    iterations: Annotated[int, Within(1)] = 100
    smoothing: Annotated[float, Within(1e-30)] = 1e-6

    needs_gram = True

    def coefficients(self, stats: Stats, weights: Tensor) -> Tensor:
        gram = stats.gram
        nu = self.smoothing * gram.diagonal()[weights > 0].max().sqrt()
        if nu == 0:
            return weights
        c = weights
        for _ in range(self.iterations):
            squares = gram.diagonal() - 2 * (gram @ c) + c @ gram @ c
            share = weights / squares.clamp_min(0).sqrt().maximum(nu)
            last, c = c, share / share.sum()
            if (c - last).abs().max() <= 1e-12:
                break
        return c
