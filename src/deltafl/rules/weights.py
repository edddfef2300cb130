"""Per-model numbers, above all weights, for all tensors or by patterns on their names."""

import math
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TypeAlias, TypeVar

from deltafl.errors import DeltaflError

T = TypeVar("T")

PerModel: TypeAlias = float | Mapping[str, Sequence[float]]
"""One number for all models, or glob on tensor names -> one for each model.

The first glob that matches counts, "*" is the last.
"""


def first_match(name: str, patterns: Mapping[str, T], default: T) -> T:
    """The value of the first glob that matches `name`."""
    return next((v for pattern, v in patterns.items() if fnmatchcase(name, pattern)), default)


def numbers_of(value: PerModel, name: str, n: int = 1) -> tuple[float, ...]:
    """The numbers (n,) of one tensor."""
    return tuple(first_match(name, value, ())) if isinstance(value, Mapping) else (value,) * n


def number_of(value: PerModel, name: str, model: int = 0) -> float:
    """That of one model for one tensor."""
    return numbers_of(value, name, model + 1)[model]


def numbers_missing(what: str, value: PerModel, n: int) -> list[str]:
    """A line for each pattern without a number for each of n models, and for a missing "*"."""
    if not isinstance(value, Mapping):
        return []
    problems = [
        f'{what} of "{pattern}": {len(row)} numbers for {n} models'
        for pattern, row in value.items()
        if len(row) != n
    ]
    if list(value)[-1:] != ["*"]:
        problems.append(f'{what} by tensor needs "*" as its last pattern, for all the others')
    return problems


Weights: TypeAlias = Mapping[str, tuple[float, ...]]
"""As `PerModel`. A negative weight negates its delta; a rule sees p_i = |w_i| / sum_j |w_j|."""

WeightsLike: TypeAlias = Mapping[str, Sequence[float]] | Sequence[float] | None


def as_weights(weights: WeightsLike, n: int) -> Weights:
    """Equal weights if None. Raises DeltaflError unless there are n numbers, not all of them 0."""
    if not isinstance(weights, Mapping):
        weights = {"*": (1.0,) * n if weights is None else weights}
    rows = {pattern: tuple(map(float, row)) for pattern, row in weights.items()}
    problems = numbers_missing("weights", rows, n)
    for pattern, row in rows.items():
        if not all(map(math.isfinite, row)):
            problems.append(f'weights of "{pattern}": {list(row)} holds one that is not finite')
    if not any(map(any, rows.values())):
        problems.append("weights: all are 0; at least one model must count")
    if problems:
        raise DeltaflError(*problems)
    return rows


def total_weight(weights: Weights, name: str = "") -> float:
    """sum_i |w_i|: the factor between the sum (scaling_coef) and the mean (server_lr)."""
    return sum(map(abs, numbers_of(weights, name)))


def shares(weights: Sequence[float]) -> list[float]:
    """p_i = |w_i| / sum_j |w_j|."""
    total = sum(map(abs, weights))
    return [abs(w) / total for w in weights]
