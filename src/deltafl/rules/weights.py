"""Per-model numbers, above all weights, for all tensors or by patterns on their names."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TypeAlias, TypeVar

from deltafl.errors import DeltaflError

T = TypeVar("T")

PerModel: TypeAlias = float | Mapping[str, Sequence[float]]
"""One number for all models, or glob on tensor names -> one for each model.

The first glob that matches counts, "*" is the last.
"""


def first_match(name: str, patterns: Iterable[tuple[str, T]], default: T) -> T:
    """The value of the first glob that matches `name`."""
    return next((value for pattern, value in patterns if fnmatchcase(name, pattern)), default)


def numbers_of(value: PerModel, name: str, n: int) -> tuple[float, ...]:
    """The numbers (n,) of one tensor."""
    if isinstance(value, Mapping):
        return tuple(first_match(name, value.items(), ()))
    return (value,) * n


def numbers_missing(what: str, value: PerModel, n: int) -> list[str]:
    """A line for each pattern that has not a number for each of n models."""
    rows = value.items() if isinstance(value, Mapping) else ()
    return [
        f'{what} of "{k}": {len(row)} numbers for {n} models' for k, row in rows if len(row) != n
    ]


@dataclass(frozen=True)
class Weights:
    """Per-model weights: `default`, or the first of `patterns` (glob, weights) that matches a name.

    A negative weight negates its delta. The rule sees p_i = |w_i| / sum_j |w_j|.
    """

    default: tuple[float, ...]
    patterns: tuple[tuple[str, tuple[float, ...]], ...] = ()

    def of(self, name: str) -> tuple[float, ...]:
        """The weights (n,) of one tensor."""
        return first_match(name, self.patterns, self.default)

    def total(self, name: str) -> float:
        """sum_i |w_i|: the factor between the sum (scaling_coef) and the mean (server_lr)."""
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
