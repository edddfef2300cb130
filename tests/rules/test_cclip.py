import numpy as np
import pytest

from deltafl.errors import DeltaflError
from deltafl.rules.cclip import CClip
from rules.reference import aggregate_of, apply, assert_close, rows, shares

# Norms from about 1 to 60, so that some deltas are clipped and others are not.
DELTAS = rows(5) * np.array([0.2, 0.5, 1.0, 3.0, 8.0])[:, None]
NORMS = np.linalg.norm(DELTAS, axis=1)


def expected(
    deltas: np.ndarray, rho: float, iterations: int, weights: list[float] | None = None
) -> np.ndarray:
    """Centered clipping with explicit vectors."""
    centre = np.zeros(deltas.shape[1])
    for _ in range(iterations):
        step = np.zeros_like(centre)
        for p, delta in zip(shares(weights, len(deltas)), deltas, strict=True):
            away = delta - centre
            step += p * away * min(1.0, rho / np.linalg.norm(away))
        centre = centre + step
    return centre


@pytest.mark.parametrize("weights", [None, [1.0, 1.0, 2.0, 3.0, 4.0]])
@pytest.mark.parametrize("iterations", [1, 2, 7])
@pytest.mark.parametrize("rho", [0.3, 5.0, 1e3])
def test_iterations_match_explicit_vectors(rho, iterations, weights):
    assert_close(
        apply(CClip(rho, iterations=iterations), DELTAS, weights),
        expected(DELTAS, rho, iterations, weights),
    )


@pytest.mark.parametrize("q", [0.0, 0.25, 0.6, 1.0])
def test_a_quantile_is_one_of_the_norms(q):
    assert_close(apply(CClip(q, "quantile"), DELTAS), expected(DELTAS, np.quantile(NORMS, q), 1))


def test_a_model_of_weight_0_has_no_part_in_the_quantile():
    actual = apply(CClip(0.5, "quantile"), DELTAS, [1.0, 1.0, 1.0, 1.0, 0.0])
    assert_close(actual, expected(DELTAS[:4], np.quantile(NORMS[:4], 0.5), 1))


def test_a_zero_delta_has_factor_1():
    deltas = DELTAS.copy()
    deltas[2] = 0
    coefficients = aggregate_of(CClip(0.0), deltas).report["coefficients"]
    assert coefficients == [0, 0, pytest.approx(1 / 5), 0, 0]
    assert not apply(CClip(0.0), deltas).any()


def test_infinite_rho_clips_nothing():
    assert_close(apply(CClip(float("inf")), DELTAS), DELTAS.mean(0))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((-1.0,), "rho is -1"),
        ((float("nan"),), "rho is nan"),
        ((1.5, "quantile"), "at most 1"),
        ((1.0, "relative"), "absolute or quantile"),
        ((1.0, "absolute", 0), "iterations is 0"),
    ],
)
def test_parameters_are_checked(arguments, message):
    with pytest.raises(DeltaflError, match=message):
        apply(CClip(*arguments), DELTAS)
