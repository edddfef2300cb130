"""The mean of whole weights on the sphere (arXiv 2603.04972), as mergekit's karcher."""

from dataclasses import dataclass
from typing import Annotated

from deltafl.rules.directions import DirectionRule
from deltafl.rules.multislerp import norm
from deltafl.rules.rule import RULES, Tensor, Traits, Within


@RULES.register("karcher")
@dataclass(frozen=True)
class Karcher(DirectionRule):
    """theta = (sum_i p_i |theta_i|) m by tensor, m the mean on the sphere of theta_i / |theta_i|.

    From the normalised sum_i p_i u_i, u_i = theta_i / |theta_i|, at most `iterations` times, until
    |T| < tol: T = sum_i p_i (a_i / sin a_i) (u_i - cos(a_i) m), a_i the angle of u_i and m (where
    sin a_i < tol it does not count), and m <- cos|T| m + sin|T| T / |T|. Zero tensors have no
    direction. Deviations from mergekit: weights count, and directions that cancel are averaged.
    """

    iterations: Annotated[int, Within(1)] = 10
    tol: Annotated[float, Within(0)] = 1e-5

    space = "weights"
    traits = Traits(odd=False)

    def coefficients(self, lengths: Tensor, cosines: Tensor, weights: Tensor) -> Tensor:
        p = weights * (lengths > 0)
        p, start = p / p.sum().clamp_min(1e-300), norm(p, cosines)
        if start < self.tol:
            return weights.expand(lengths.shape)
        b = p / start
        for _ in range(self.iterations):
            to_mean = (cosines @ b[:, :, None])[:, :, 0].clamp(-1, 1)
            angles = to_mean.acos()
            pulls = p * (angles / angles.sin()).where(angles.sin() >= self.tol, 0)
            step = pulls - (pulls * to_mean).sum() * b
            size = norm(step, cosines)
            if size < self.tol:
                break
            b = size.cos() * b + size.sin() / size * step
        return (lengths @ weights) * b / lengths.masked_fill(lengths == 0, 1)
