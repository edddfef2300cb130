"""Per-model weights, for all tensors or by patterns on their names."""

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TypeAlias

from deltafl.errors import DeltaflError


@dataclass(frozen=True)
class Weights:
    """Per-model weights: `default`, or the first of `patterns` (glob on the tensor name, weights) that matches.

    A negative weight negates its delta. The rule sees p_i = |w_i| / sum_j |w_j|.
    """

    default: tuple[float, ...]
    patterns: tuple[tuple[str, tuple[float, ...]], ...] = ()

    def of(self, name: str) -> tuple[float, ...]:
        """The weights (n,) of one tensor."""
        return next((w for pattern, w in self.patterns if fnmatchcase(name, pattern)), self.default)

    def total(self, name: str) -> float:
        """sum_i |w_i|: the factor between the sum convention (scaling_coef) and the mean one (server_lr)."""
        return sum(map(abs, self.of(name)))


WeightsLike: TypeAlias = Weights | Sequence[float] | None


def as_weights(weights: WeightsLike, n: int) -> Weights:
    """Equal weights if None. Raises DeltaflError unless there are n numbers, not all of them 0."""
    if not isinstance(weights, Weights):
        weights = Weights((1.0,) * n if weights is None else tuple(float(w) for w in weights))
    for where, row in (("weights", weights.default), *weights.patterns):
        if len(row) != n:
            raise DeltaflError(f"{where}: {len(row)} weights for {n} models")
        if not all(abs(w) < float("inf") for w in row):
            raise DeltaflError(f"{where}: {list(row)} holds a number that is not finite")
    if not any(any(row) for row in (weights.default, *(w for _, w in weights.patterns))):
        raise DeltaflError("weights: all are 0; at least one model must count")
    return weights


def shares(weights: Sequence[float]) -> list[float]:
    """p_i = |w_i| / sum_j |w_j|."""
    total = sum(map(abs, weights))
    return [abs(w) / total for w in weights] if total else [0.0 for _ in weights]
