"""Deltas as products of two small matrices, read by rows, and the nearest product of a rank."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from deltafl.algebra.tensors import Lazy, Spec
from deltafl.rules.matrices import triples


class LowRank(Lazy):
    """left @ right of each tensor, in its own dtype, a block of rows at a time; zeros without one.

    product: name -> left (out, r) and right (r, in), in the dtype and on the device of the tensor,
    None for zeros. Those of the tensor that was last read are kept.
    """

    def __init__(
        self,
        specs: Mapping[str, Spec],
        product: Callable[[str], tuple[Tensor, Tensor] | None],
    ) -> None:
        self.names = self._specs = specs
        self._product = product
        self._held: tuple[str, tuple[Tensor, Tensor] | None] = "", None

    def spec(self, name: str) -> Spec:
        return self._specs[name]

    def factors(self, name: str) -> tuple[Tensor, Tensor] | None:
        """left (out, r) and right (r, in); None for zeros."""
        if self._held[0] != name:
            self._held = name, self._product(name)
        return self._held[1]

    def read(self, name: str, start: int, stop: int, out: Tensor) -> None:
        found = self.factors(name)
        if found is None:
            out.zero_()
            return
        left, right = found
        width = right.shape[1]
        first = start // width
        rows = left[first : -(-stop // width)] @ right
        out.copy_(rows.view(-1)[start - first * width : stop - first * width])


def nearest(
    left: Tensor, right: Tensor | None, rank: int, energy: float | None = None
) -> tuple[Tensor, Tensor, float, float]:
    """B (out, rank) and A (rank, in), float64, whose product is the nearest of this rank to left @
    right, or to `left` alone, in the Frobenius norm; that norm, and the error relative to it.

    energy: of the least rank, up to this one, that keeps this share of the squared norm.
    left @ right is never made: with left = P R and right^T = Q T (QR) it has the singular values of
    R T^T. Of a smaller rank, B and A end in zeros.
    """
    core, sides = left.double(), []
    if right is not None:
        sides = [torch.linalg.qr(side.double()) for side in (left, right.mT)]
        core = sides[0].R @ sides[1].R.mT
    u, s, v = triples(core, rank)
    square = float(core.square().sum())
    if energy is not None:
        rank = min(len(s), 1 + int((s.square().cumsum(0) < energy * square).sum()))
        u, s, v = u[:, :rank], s[:rank], v[:, :rank]
    ends = [side.Q @ end for side, end in zip(sides, (u, v), strict=True)] if sides else [u, v]
    b, a = (torch.zeros(len(end), rank).to(end) for end in ends)
    for made, end in zip((b, a), ends, strict=True):
        made[:, : len(s)] = end * s.sqrt()
    rest = max(0.0, square - float(s.square().sum()))
    return b, a.mT, square**0.5, (rest / square) ** 0.5 if square else 0.0
