import numpy as np
import pytest

from deltafl.rules.knots import Knots
from deltafl.rules.median import Median
from deltafl.rules.ties import Ties
from rules.oracle import KINDS, assert_is, models, svd
from rules.test_formulas import keep


def ties(rows: np.ndarray, p: np.ndarray, density: float) -> np.ndarray:
    """TIES of flat rows, each trimmed on its own."""
    kept = np.array([keep(row, density) for row in rows])
    sign = np.sign(np.round(p @ kept, 12))
    agree = (np.sign(kept) == sign) & (sign != 0)
    return (p @ (kept * agree)) / np.maximum(p @ agree, 1e-12)


def in_the_shared_basis(inner):
    """The formula: `inner` of S V_i^T = U^T delta_i, which of a zero delta is exactly 0."""

    def formula(matrices, p):
        u, s, _ = svd(np.hstack(matrices))
        if not len(s):
            return 0 * matrices[0]
        parts = np.array([u.T @ matrix for matrix in matrices])
        return u @ inner(parts.reshape(len(parts), -1), p).reshape(parts.shape[1:])

    return formula


@pytest.mark.parametrize("weights", [None, [1.0, 2.0, 0.5]])
@pytest.mark.parametrize("density", [0.2, 1.0])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "equal"])
def test_is_ties_in_the_shared_basis(kind, density, weights):
    wanted = in_the_shared_basis(lambda rows, p: ties(rows, p, density))
    assert_is(Knots(Ties(density)), models(3, kind), wanted, weights)


def test_another_rule_in_the_shared_basis_and_equal_deltas():
    assert_is(Knots(Median()), models(3), in_the_shared_basis(lambda rows, _: np.median(rows, 0)))
    for n in (1, 3):
        assert_is(Knots(Ties(1.0)), models(n, "equal"), lambda m, p: m[0])
