from fractions import Fraction

import numpy as np
import pytest

from deltafl.errors import DeltaflError
from deltafl.rules.fedgma import FedGMA
from rules.reference import apply, assert_close, integer_rows, shares


def expected(deltas: np.ndarray, rho: Fraction, weights: list[int]) -> np.ndarray:
    """The formula with the comparison in fractions."""
    total, update = sum(weights), []
    for column in deltas.T:
        votes = abs(sum(w * int(np.sign(x)) for w, x in zip(weights, column, strict=True)))
        agreement = Fraction(votes, total)
        mask = 1 if agreement >= rho else agreement
        update.append(float(mask) * (shares(weights, len(weights)) @ column))
    return np.array(update)


@pytest.mark.parametrize("tenths", range(11))
@pytest.mark.parametrize("n", [1, 2, 3, 5, 7, 10])
def test_agreement_is_compared_exactly(n, tenths):
    deltas = integer_rows(n)
    assert_close(
        apply(FedGMA(tenths / 10), deltas), expected(deltas, Fraction(tenths, 10), [1] * n)
    )


@pytest.mark.parametrize("agreeing", range(5, 11))
def test_ten_models_at_the_level_itself_are_not_softened(agreeing):
    """In floats 0.1 * 6 > 0.6, so the coordinate at A = rho would be softened."""
    column = np.where(np.arange(10) < agreeing, 2.0, -1.0)[:, None] * np.ones(6)
    rho = (2 * agreeing - 10) / 10
    assert_close(apply(FedGMA(rho), column), column.mean(0))
    assert_close(
        apply(FedGMA(min(1.0, rho + 0.01)), column), max(rho, 0) ** (rho < 1) * column.mean(0)
    )


@pytest.mark.parametrize("rho", [Fraction(1, 2), Fraction(1, 3), Fraction(5, 6)])
def test_weighted_votes(rho):
    deltas = integer_rows(3)
    assert_close(
        apply(FedGMA(float(rho)), deltas, [1.0, 2.0, 3.0]), expected(deltas, rho, [1, 2, 3])
    )


@pytest.mark.parametrize("rho", [-0.1, 1.5, float("nan")])
def test_rho_outside_0_to_1_is_refused(rho):
    with pytest.raises(DeltaflError, match=r"fedgma: rho is .*; it must be in \[0, 1\]"):
        FedGMA(rho)
