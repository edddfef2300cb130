from fractions import Fraction

import numpy as np
import pytest

from deltafl.errors import DeltaflError
from deltafl.rules.consensus import Consensus
from rules.reference import apply, assert_close, integer_rows


def expected(deltas: np.ndarray, threshold: Fraction, least: int, weights: list[int]) -> np.ndarray:
    """TALL masks with every comparison in fractions."""
    total, counted, update = sum(weights), sum(w > 0 for w in weights), []
    for column in deltas.T:
        parts = [Fraction(w * int(x), total) for w, x in zip(weights, column, strict=True) if w]
        mean = sum(parts)
        votes = sum(abs(part) >= threshold * abs(mean - part) for part in parts)
        update.append(float(mean) if votes >= min(least, counted) else 0.0)
    return np.array(update)


@pytest.mark.parametrize("weights", [[1, 1, 1, 1], [1, 2, 0, 3], [0, 0, 1, 0]])
@pytest.mark.parametrize("least", [0, 1, 2, 3])
@pytest.mark.parametrize("threshold", [Fraction(1, 5), Fraction(2, 5), Fraction(1), Fraction(5)])
def test_keeps_what_enough_models_need(threshold, least, weights):
    deltas = integer_rows(4)
    actual = apply(Consensus(float(threshold), least), deltas, weights)
    assert_close(actual, expected(deltas, threshold, least, weights))


def test_k_0_is_task_arithmetic_and_one_model_is_itself():
    deltas = integer_rows(3)
    assert_close(apply(Consensus(5.0, 0), deltas), deltas.mean(0))
    assert_close(apply(Consensus(), deltas[:1]), deltas[0])


def test_a_threshold_of_0_is_refused():
    with pytest.raises(DeltaflError, match="consensus: mask_threshold is 0; it must be 1e-06"):
        Consensus(0.0)
