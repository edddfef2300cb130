import numpy as np
import pytest
from scipy.optimize import minimize

from deltafl.errors import DeltaflError
from deltafl.rules.geometric_median import GeometricMedian
from rules.reference import apply, rows, shares


def cost(z: np.ndarray, deltas: np.ndarray, p: np.ndarray) -> float:
    return float(p @ np.linalg.norm(deltas - z, axis=1))


@pytest.mark.parametrize("weights", [None, [1.0, 2.0, 1.0, 0.5, 1.5]])
def test_minimises_the_sum_of_distances(weights):
    deltas, p = rows(5, 12), shares(weights, 5)
    best = minimize(cost, p @ deltas, args=(deltas, p), method="BFGS", options={"gtol": 1e-9})
    found = apply(GeometricMedian(), deltas, weights)
    # The cost is flat at its minimum, so 1e-4 in z is what 1e-8 in the cost allows.
    np.testing.assert_allclose(found, best.x, atol=1e-4)
    assert cost(found, deltas, p) <= best.fun + 1e-6


def test_a_delta_of_more_than_half_the_weight_is_the_minimum():
    deltas = rows(3, 12)
    np.testing.assert_allclose(
        apply(GeometricMedian(), deltas, [1.0, 5.0, 1.0]), deltas[1], atol=1e-4
    )


def test_three_points_of_a_triangle_give_the_fermat_point():
    """Each pair of directions from the Fermat point is at 120 degrees."""
    deltas = np.zeros((3, 6))
    deltas[:, 0], deltas[:, 5] = [0, 4, 1], [0, 0, 3]
    found = apply(GeometricMedian(), deltas)
    rays = [(d - found) / np.linalg.norm(d - found) for d in deltas]
    assert [rays[i] @ rays[j] for i, j in ((0, 1), (0, 2), (1, 2))] == pytest.approx(
        [-0.5] * 3, abs=1e-4
    )


def test_one_outlier_of_any_size_moves_it_little():
    deltas = rows(7)
    far = deltas.copy()
    far[0] *= 1e6
    assert np.linalg.norm(apply(GeometricMedian(), far)) < 2 * np.linalg.norm(deltas, axis=1).max()


@pytest.mark.parametrize("arguments", [{"iterations": 0}, {"smoothing": 0.0}, {"smoothing": -1.0}])
def test_parameters_are_checked(arguments):
    with pytest.raises(DeltaflError, match="geometric_median"):
        GeometricMedian(**arguments)
