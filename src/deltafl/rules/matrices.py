"""What rules of matrices share: which tensors are matrices, and singular values in float64."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from deltafl.rules.rule import Tensor, TensorRule, Traits
from deltafl.rules.weighted import weighted_sum

NULL = 1e-6
"""A singular value below this share of all of them (by their norm) is 0."""


class MatrixRule(TensorRule):
    """R is computed for each matrix on its own, in float64; other tensors are averaged.

    Matrices (out, in) are tensors of two dimensions and, as (out, in k k), the kernels of
    convolutions; not those of depthwise ones, (out, 1, k, k). A rule whose paper sums the matrices
    averages the others at the paper's scale, which is their mean / n here. A search tries `values`.
    """

    traits = Traits(fixed_point=False, coordinate_symmetric=False, native_scale="sum")

    @classmethod
    def grid(cls, given: Mapping[str, Any], norms: Sequence[float]) -> Mapping[str, Any]:
        return cls.values

    @abstractmethod
    def merged(self, matrices: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
        """n times (out, in), p > 0 with sum 1 -> (out, in) float64."""

    def others(self, tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
        """n times (*shape), p > 0 with sum 1 -> (*shape), of tensors that are no matrices."""
        mean = weighted_sum(tensors, weights)
        return mean / len(tensors) if self.traits.native_scale == "sum" else mean

    def combine(self, tensors: Tensor, weights: Sequence[float]) -> Tensor:
        counted = [(t, w) for t, w in zip(tensors, weights, strict=True) if w > 0]
        parts, shares = [t for t, _ in counted], [w for _, w in counted]
        shape = tensors.shape[1:]
        if tensors.numel() and (len(shape) == 2 or (len(shape) == 4 and shape[1] > 1)):
            result = self.merged([t.flatten(1) for t in parts], shares)
        else:
            result = self.others(parts, shares)
        return result.reshape(shape).to(tensors.dtype)


def triples(matrix: Tensor, rank: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """u (out, r), s (r,), v (in, r), float64: the `rank` largest singular triples, or all.

    By the eigenvectors of the smaller Gram matrix, in a third of the time of an SVD. Null
    directions are left out, so that r may be less than `rank`, and 0.
    """
    import torch

    matrix = matrix.double()
    if matrix.shape[0] > matrix.shape[1]:
        v, s, u = triples(matrix.mT, rank)
        return u, s, v
    squares, u = torch.linalg.eigh(matrix @ matrix.mT)
    kept = squares > NULL**2 * squares.sum()
    if rank is not None:
        kept[: len(kept) - rank] = False
    u = u[:, kept]
    v = matrix.mT @ u
    s = v.norm(dim=0)
    return u, s, v / s


def orthonormal(matrix: Tensor) -> Tensor:
    """The nearest matrix with orthonormal columns, A (A^T A)^-1/2; null directions stay 0."""
    u, _, v = triples(matrix)
    return u @ v.mT


def joined(parts: Sequence[tuple[Tensor, Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    """The triples of several matrices in one, the directions on either side made orthonormal."""
    import torch

    u, s, v = (torch.cat(part, -1) for part in zip(*parts, strict=True))
    kept = s > NULL * s.norm()
    return orthonormal(u[:, kept]), s[kept], orthonormal(v[:, kept])
