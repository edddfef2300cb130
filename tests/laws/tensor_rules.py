"""Rules of whole tensors, to hold the engine to the laws: no registered one is of this kind yet."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from deltafl.rules.rule import TensorRule, Traits


@dataclass(frozen=True)
class MeanDirection(TensorRule):
    """sum_i p_i ||d_i|| times the direction of sum_i p_i d_i / ||d_i||, of each tensor flattened."""

    traits = Traits(coordinate_symmetric=False)

    def combine(self, tensors: Tensor, weights: Sequence[float]) -> Tensor:
        rows = tensors.reshape(len(tensors), tensors[0].numel())
        norms = rows.double().norm(dim=1).to(rows.dtype)
        shares = rows.new_tensor(weights)
        direction = (shares / norms.clamp_min(1e-30)) @ rows
        length = direction.double().norm().to(rows.dtype).clamp_min(1e-30)
        return (direction * ((shares @ norms) / length)).reshape(tensors.shape[1:])


@dataclass(frozen=True)
class FlatSpectrum(TensorRule):
    """Of matrices the mean with all its singular values made alike (Iso-C), of others the mean."""

    traits = Traits(fixed_point=False, coordinate_symmetric=False)

    def combine(self, tensors: Tensor, weights: Sequence[float]) -> Tensor:
        mean = (tensors * tensors.new_tensor(weights).view(-1, *[1] * (tensors.dim() - 1))).sum(0)
        if mean.dim() != 2 or not mean.numel():
            return mean
        u, s, v = mean.double().svd()
        kept = s > 1e-9 * s[0]
        return ((u[:, kept] @ v[:, kept].T) * s.mean()).to(mean.dtype)


TENSOR_RULES = (MeanDirection(), FlatSpectrum())
