"""The weighted regression that WUDI, RegMean and their kin solve, each with what weighs."""

from deltafl.rules.rule import Tensor


def regressed(cross: Tensor, gram: Tensor, prior: Tensor, ridge: float) -> tuple[Tensor, bool]:
    """R = (sum_t D_t C_t + lambda P) (sum_t C_t + lambda I)^-1, and whether it is P instead.

    R minimises sum_t tr((R - D_t) C_t (R - D_t)^T) + lambda ||R - P||^2. lambda = `ridge` times the
    mean diagonal of the gram, at least 1e-30, so that an all-zero gram gives the prior. Where the
    gram stays singular (a column is a combination of others to 6 digits), R is the prior, of each
    matrix of a batch on its own. In float64 by Cholesky.

    cross: sum_t D_t C_t, (..., out, in); gram: sum_t C_t, (..., in, in), symmetric and >= 0; prior:
    P, (..., out, in). Leading dimensions are a batch (the channels of a depthwise convolution).
    Returns R, (..., out, in) float64, and whether the prior stands for any matrix of the batch.
    """
    import torch

    cross, prior, weighed = cross.double(), prior.double(), gram.double().clone()
    diagonal = weighed.diagonal(dim1=-2, dim2=-1)
    ridges = (ridge * diagonal.mean(-1)).clamp_min(1e-30)[..., None]
    diagonal.add_(ridges)
    factor, failed = torch.linalg.cholesky_ex(weighed)
    solution = torch.cholesky_solve((cross + ridges[..., None] * prior).mT, factor).mT
    pivots = factor.diagonal(dim1=-2, dim2=-1).square()
    sound = (pivots > 1e-12 * diagonal).all(-1) & (failed == 0)
    return torch.where(sound[..., None, None], solution, prior), not sound.all()
