"""What the tests of rules of matrices share: small models of known kinds, and linear algebra by numpy's SVD."""

from collections.abc import Callable, Sequence

import numpy as np
import torch

from deltafl.algebra.aggregate import Aggregate
from deltafl.algebra.deltas import Update
from deltafl.rules.rule import Rule, Source

SHAPES = {
    "tall": (9, 4),
    "wide": (4, 30),
    "square": (6, 6),
    "row": (1, 7),
    "column": (5, 1),
    "conv": (4, 3, 2, 2),
    "patches": (5, 1, 2, 2),
    "depthwise": (5, 1, 3, 3),
    "bias": (5,),
    "scale": (),
    "table": (1, 3, 4),
}
MATRICES = {"tall", "wide", "square", "row", "column", "conv", "patches"}

Model = dict[str, np.ndarray]


def models(n: int, kind: str = "normal", seed: int = 0) -> list[Model]:
    """n deltas of float32 values. rank 1: each matrix; dead: no row and column 0; zero: the first model."""
    draw = np.random.default_rng(seed)
    found = [{k: draw.standard_normal(s) for k, s in SHAPES.items()} for _ in range(n)]
    for i, model in enumerate(found):
        for name in MATRICES:
            flat = model[name].reshape(len(model[name]), -1)
            if kind == "rank 1":
                flat[:] = np.outer(flat[:, 0], flat[0])
            if kind == "dead":
                flat[0 : len(flat) > 1] = flat[:, 0] = 0
            if kind == "equal":
                flat[:] = found[0][name].reshape(flat.shape)
            if kind == "zero" and i == 0:
                flat[:] = 0
    return [{k: v.astype(np.float32).astype(np.float64) for k, v in m.items()} for m in found]


KINDS = ("normal", "rank 1", "dead", "equal", "zero")


def merge(rule: Rule, deltas: Sequence[Model], weights: Sequence[float] | None = None) -> Model:
    """R through the engine in float64."""
    updates = [
        Update({k: torch.tensor(v).float() for k, v in d.items()}, Source(f"m{i}"))
        for i, d in enumerate(deltas)
    ]
    result = Aggregate(rule, updates, weights, dtype=torch.float64)
    return {k: v.numpy() for k, v in result.items()}


def assert_is(
    rule: Rule,
    deltas: Sequence[Model],
    formula: Callable[[list[np.ndarray], np.ndarray], np.ndarray],
    weights: Sequence[float] | None = None,
) -> None:
    """R is `formula(matrices, p)` of matrices to 1e-6, and the mean, at the paper's scale, of the rest."""
    p = np.array(weights or [1.0] * len(deltas))
    p = p / p.sum()
    for name, found in merge(rule, deltas, weights).items():
        if name in MATRICES:
            parts = [d[name].reshape(len(d[name]), -1) for d in deltas]
            expected = formula(parts, p).reshape(SHAPES[name])
        else:
            parts = [d[name] for d in deltas]
            expected = sum(w * x for w, x in zip(p, parts, strict=True))
            if rule.traits.native_scale == "sum":
                expected = expected / np.count_nonzero(p)
        size = max(np.abs(x).max() for x in parts) or 1
        np.testing.assert_allclose(found, expected, atol=1e-6 * size, rtol=1e-6, err_msg=name)


def svd(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """u, s, v with columns, the largest first; without those of singular value 0."""
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    kept = s > 1e-6 * np.linalg.norm(s)
    return u[:, kept], s[kept], vt[kept].T


def polar(matrix: np.ndarray) -> np.ndarray:
    """The nearest matrix with orthonormal columns, null directions left out."""
    u, _, v = svd(matrix)
    return u @ v.T
