import numpy as np
import pytest
import torch

from deltafl.errors import DeltaflError
from deltafl.rules.median import Median
from rules.reference import apply, integer_rows, rows


@pytest.mark.parametrize("n", range(1, 12))
@pytest.mark.parametrize("make", [rows, integer_rows])
def test_is_the_median_of_numpy(n, make):
    deltas = make(n)
    expected = np.median(deltas.astype(np.float32), axis=0)
    np.testing.assert_array_equal(apply(Median(), deltas), expected)


@pytest.mark.parametrize("n", range(1, 12))
def test_lower_is_the_median_of_torch(n):
    deltas = rows(n)
    np.testing.assert_array_equal(
        apply(Median("lower"), deltas), torch.tensor(deltas).median(0).values.numpy()
    )


@pytest.mark.parametrize("middle", ["midpoint", "lower"])
@pytest.mark.parametrize(
    "weights",
    [
        [1, 2, 3],
        [1, 1, 2],
        [5, 1, 1],
        [1, 3, 2, 6],
        [3, 3, 2, 1, 1, 4],
        [0, 1, 0, 1],
        [*[1] * 11, 11],
    ],
)
def test_weights_repeat_the_models(weights, middle):
    """A model of weight 3 is three models of weight 1; a weight of 0 is none."""
    for make in (rows, integer_rows):
        deltas = make(len(weights))
        repeated = np.repeat(deltas, weights, axis=0).astype(np.float32)
        if middle == "lower":
            expected = np.sort(repeated, axis=0)[(len(repeated) - 1) // 2]
        else:
            expected = np.median(repeated, axis=0)
        np.testing.assert_array_equal(
            apply(Median(middle), deltas, [float(w) for w in weights]), expected
        )


def test_an_unknown_middle_is_refused():
    with pytest.raises(DeltaflError, match="midpoint or lower"):
        Median("upper")  # type: ignore[arg-type]
