"""What rules of directions share: the lengths of vectors and the angles between them."""

from abc import abstractmethod
from collections.abc import Sequence

from deltafl.rules.rule import Tensor, TensorRule


class DirectionRule(TensorRule):
    """R = sum_i c_i v_i, where the c depend on the v by their lengths and cosines alone.

    A tensor is one vector v_i, or many, each with c of its own. Computed in float64.
    """

    def vectors(self, tensors: Tensor) -> Tensor:
        """(n, *shape) -> (n, r, k): r vectors of each tensor, in the order of their elements."""
        return tensors.reshape(len(tensors), 1, -1)

    @abstractmethod
    def coefficients(self, lengths: Tensor, cosines: Tensor, weights: Tensor) -> Tensor:
        """(r, n), (r, n, n), p (n,) -> c, (r, n), all float64; a cosine with a zero vector is 0."""

    def combine(self, tensors: Tensor, weights: Sequence[float]) -> Tensor:
        tensors = tensors[-len(weights) :]
        vectors = self.vectors(tensors).transpose(0, 1).double()
        lengths = vectors.norm(dim=2)
        units = lengths.masked_fill(lengths == 0, 1)[:, :, None]
        cosines = (vectors @ vectors.mT / units / units.mT).clamp_(-1, 1)
        c = self.coefficients(lengths, cosines, lengths.new_tensor(weights))
        return (c[:, None] @ vectors)[:, 0].to(tensors.dtype).reshape(tensors.shape[1:])


def along_rows(tensors: Tensor) -> Tensor:
    """(n, *shape) -> (n, r, k), the r rows of the last dimension; of a vector itself, r = 1."""
    return tensors.reshape(len(tensors), -1, tensors.shape[-1] if tensors.dim() > 1 else 1)


def arc(cosines: Tensor, shares: Tensor, straight: float) -> Tensor:
    """Coefficients of two vectors on the arc between them, sin(share angle) / sin(angle), (r, 2).

    cosines: (r,). The shares themselves, a straight line, where |cosine| > straight.
    """
    angles = cosines.acos()[:, None]
    return shares.where(cosines.abs()[:, None] > straight, (angles * shares).sin() / angles.sin())
