import numpy as np
import pytest
from scipy.stats import trim_mean

from deltafl.errors import DeltaflError
from deltafl.rules.trimmed_mean import TrimmedMean
from rules.reference import apply, assert_close, integer_rows, rows


@pytest.mark.parametrize(("n", "trim"), [(1, 0), (3, 1), (4, 1), (5, 0), (7, 3), (10, 2)])
@pytest.mark.parametrize("make", [rows, integer_rows])
def test_drops_both_ends(make, n, trim):
    deltas = make(n)
    assert_close(apply(TrimmedMean(trim), deltas), trim_mean(deltas, (trim + 0.5) / n))


@pytest.mark.parametrize(
    ("weights", "trim"), [([1, 2, 3], 1), ([2, 1, 2, 3], 1), ([1, 4, 1, 2, 2], 2)]
)
def test_weights_repeat_the_models(weights, trim):
    """Each model w_i * n times: the share trim / n at either end is then whole numbers of copies."""
    for make in (rows, integer_rows):
        n, deltas = len(weights), make(len(weights))
        copies = np.sort(np.repeat(deltas, np.array(weights) * n, axis=0), axis=0)
        cut = trim * sum(weights)
        expected = copies[cut : len(copies) - cut].mean(0)
        assert_close(apply(TrimmedMean(trim), deltas, [float(w) for w in weights]), expected)


@pytest.mark.parametrize(("n", "trim"), [(1, 1), (2, 1), (4, 2)])
def test_trimming_everything_is_refused(n, trim):
    with pytest.raises(
        DeltaflError, match=f"trim {trim} leaves nothing of {n} models .* at least {2 * trim + 1}"
    ):
        apply(TrimmedMean(trim), rows(n))


def test_models_of_weight_0_do_not_count():
    with pytest.raises(DeltaflError, match="trim 1 leaves nothing of 2 models of weight above 0"):
        apply(TrimmedMean(1), rows(3), [1.0, 1.0, 0.0])


def test_a_negative_trim_is_refused():
    with pytest.raises(DeltaflError, match="trim is -1"):
        TrimmedMean(-1)
