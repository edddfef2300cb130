"""What rules of matrices share: which tensors are matrices, and singular triples in float64."""

from abc import abstractmethod
from collections.abc import Sequence

from deltafl.rules.rule import Tensor, TensorRule, Traits
from deltafl.rules.weighted import weighted_sum

NULL = 1e-6
"""A singular value below this share of all of them (their norm) is 0."""


def is_matrix(shape: Sequence[int]) -> bool:
    """Whether a tensor is one: of two dimensions or, as (out, in k k), the kernel of a convolution.

    Kernels (out, 1, k, k) are taken for depthwise ones, which are no matrices, if k is odd, and for
    an embedding of grey patches if it is even.
    """
    return len(shape) == 2 or (len(shape) == 4 and (shape[1] > 1 or shape[3] % 2 == 0))


class MatrixRule(TensorRule):
    """R of each matrix is computed in float64; what is no matrix is averaged.

    A rule whose paper sums the matrices and scales sum and average alike has the average / n here.
    """

    traits = Traits(fixed_point=False, coordinate_symmetric=False, native_scale="sum")

    @abstractmethod
    def merged(self, matrices: Tensor, weights: Sequence[float]) -> Tensor:
        """(n, out, in) float64, p > 0 with sum 1 -> (out, in)."""

    def combine(self, tensors: Tensor, weights: Sequence[float]) -> Tensor:
        shape = tensors.shape[1:]
        if is_matrix(shape) and tensors.numel():
            merged = self.merged(tensors.double().flatten(2), weights)
            return merged.to(tensors.dtype).reshape(shape)
        mean = weighted_sum(tensors, weights)
        return mean / len(tensors) if self.traits.native_scale == "sum" else mean


Triples = tuple[Tensor, Tensor, Tensor]
"""u (out, r), s (r,), v (in, r): singular directions and values, the largest first."""


def triples(matrix: Tensor, rank: int = 1 << 30) -> Triples:
    """The `rank` largest, r = 0 of a zero matrix: null directions are left out.

    By the eigenvectors of the smaller Gram matrix, in a third of the time of an SVD.
    """
    import torch

    if matrix.shape[0] > matrix.shape[1]:
        v, s, u = triples(matrix.mT, rank)
        return u, s, v
    squares, u = torch.linalg.eigh(-matrix @ matrix.mT)  # negated: the largest first
    kept = squares < NULL**2 * squares.sum()
    kept[rank:] = False
    v = matrix.mT @ u[:, kept]
    s = v.norm(dim=0)
    return u[:, kept], s, v / s


def orthonormal(matrix: Tensor) -> Tensor:
    """The nearest matrix with orthonormal columns, A (A^T A)^-1/2; null directions stay 0."""
    u, _, v = triples(matrix)
    return u @ v.mT


def joined(parts: Sequence[Triples]) -> Triples:
    """The triples of several matrices as one, the directions on either side made orthonormal."""
    import torch

    u, s, v = (torch.cat(part, -1) for part in zip(*parts, strict=True))
    kept = s > NULL * s.norm()
    return orthonormal(u[:, kept]), s[kept], orthonormal(v[:, kept])
