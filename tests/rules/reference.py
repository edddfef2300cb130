"""What the tests of single rules share: deltas as numpy rows, and R of them through the public engine."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from deltafl.algebra.aggregate import Aggregate
from deltafl.algebra.deltas import Update
from deltafl.rules.rule import Rule, Source

SPLIT = 4
"""Elements of the first of the two tensors a row is cut into, so that every rule crosses a tensor's edge."""


def rows(n: int, m: int = 50, seed: int = 0) -> np.ndarray:
    """(n, m) normal values that float32 holds exactly."""
    return np.random.default_rng(seed).standard_normal((n, m)).astype(np.float32).astype(np.float64)


def integer_rows(n: int, m: int = 200, seed: int = 0) -> np.ndarray:
    """(n, m) values in -3 .. 3: many equal ones, zeros and exact cancellations."""
    return np.random.default_rng(seed).integers(-3, 4, (n, m)).astype(np.float64)


def sources(n: int, **fields: Sequence[Any]) -> list[Source]:
    """n sources named m0, m1, ..; each keyword gives one field of all."""
    return [Source(f"m{i}", **{k: v[i] for k, v in fields.items()}) for i in range(n)]


def aggregate_of(
    rule: Rule, deltas: np.ndarray, weights: Sequence[float] | None = None, **fields: Any
) -> Aggregate:
    """R of the rows, each as a delta of two tensors."""
    updates = [
        Update(
            {"a": torch.tensor(row[:SPLIT]).float(), "b": torch.tensor(row[SPLIT:]).float()}, source
        )
        for row, source in zip(deltas, sources(len(deltas), **fields), strict=True)
    ]
    return Aggregate(rule, updates, weights)


def apply(
    rule: Rule, deltas: np.ndarray, weights: Sequence[float] | None = None, **fields: Any
) -> np.ndarray:
    """R of the rows, (m,) float64."""
    update = aggregate_of(rule, deltas, weights, **fields)
    return torch.cat([update["a"], update["b"]]).double().numpy()


def shares(weights: Sequence[float] | None, n: int) -> np.ndarray:
    """Weights that sum to 1."""
    p = np.ones(n) if weights is None else np.asarray(weights, float)
    return p / p.sum()


def assert_close(actual: np.ndarray, expected: np.ndarray) -> None:
    """Equal up to a few roundings in float32 (its unit is 6e-8)."""
    np.testing.assert_allclose(
        actual, expected, rtol=1e-6, atol=1e-6 * max(1e-30, np.abs(expected).max())
    )
