import numpy as np
import pytest

from deltafl.errors import DeltaflError
from deltafl.rules.ties import Ties
from rules.reference import SPLIT, aggregate_of, apply, assert_close, integer_rows, rows


def bfloat16_rows(n: int, m: int = 300) -> np.ndarray:
    """Values with 3 bits of mantissa: many are equal, some are 0."""
    values = rows(n, m, seed=1).astype(np.float32)
    coarse = (values.view(np.uint32) & 0xFFF00000).view(np.float32).astype(np.float64)
    return np.where(np.abs(coarse) < 0.1, 0, coarse)


def trimmed(row: np.ndarray, density: float) -> np.ndarray:
    """The k = int(density * size), at least 1, largest magnitudes, by sorting; those equal to the last are kept."""
    k = max(1, int(density * len(row))) if density > 0 else 0
    if k == 0:
        return np.zeros_like(row)
    return np.where(np.abs(row) >= np.sort(np.abs(row))[::-1][k - 1], row, 0)


def expected(deltas, density, merge="mean", per_tensor=False, weights=None):
    w = np.ones(len(deltas)) if weights is None else np.array(weights)
    cut = [slice(0, SPLIT), slice(SPLIT, None)] if per_tensor else [slice(None)]
    kept = np.array(
        [np.concatenate([trimmed(row[part], density) for part in cut]) for row in deltas]
    )
    update = np.zeros(deltas.shape[1])
    for j, column in enumerate(kept.T):
        sign = np.sign(w @ column)
        agree = np.sign(column) == sign
        if sign != 0:
            total = w[agree] @ column[agree]
            update[j] = total / (w[agree].sum() if merge == "mean" else w.sum())
    return update


@pytest.mark.parametrize("merge", ["mean", "sum"])
@pytest.mark.parametrize("per_tensor", [False, True])
@pytest.mark.parametrize("density", [0.0, 0.05, 0.2, 0.7, 1.0])
@pytest.mark.parametrize("make", [rows, integer_rows, bfloat16_rows])
def test_trims_elects_and_merges(make, density, per_tensor, merge):
    deltas = make(5)
    assert_close(
        apply(Ties(density, merge, per_tensor), deltas),
        expected(deltas, density, merge, per_tensor),
    )


@pytest.mark.parametrize("merge", ["mean", "sum"])
@pytest.mark.parametrize("weights", [[1.0, 2.0, 3.0, 1.0], [0.0, 1.0, 2.0, 1.0]])
def test_weighted_votes(weights, merge):
    deltas = integer_rows(4)
    assert_close(
        apply(Ties(0.6, merge), deltas, weights), expected(deltas, 0.6, merge, weights=weights)
    )


@pytest.mark.parametrize("n", range(2, 12))
def test_deltas_that_cancel_elect_nothing(n):
    """1 + 2 + .. - total = 0; a sum of weighted, rounded terms is not always 0."""
    column = np.arange(1.0, n + 1)
    column[-1] = -column[:-1].sum()
    for scale in (1.0, 173.0, 0.75):  # products that float32 holds exactly
        assert not apply(Ties(1.0), np.tile(scale * column[:, None], 6)).any()


def test_values_equal_to_the_threshold_are_kept_and_reported():
    deltas = np.ones((2, 10))
    deltas[1] = np.arange(1, 11)
    report = aggregate_of(Ties(0.3), deltas).report
    assert report["kept_fraction"] == {"m0": 1.0, "m1": 0.3}


def test_a_zero_delta_changes_only_the_vote():
    deltas = rows(3)
    deltas[1] = 0
    assert_close(apply(Ties(0.5), deltas), expected(deltas, 0.5))


@pytest.mark.parametrize("density", [-0.1, 1.1, float("nan")])
def test_a_density_outside_0_to_1_is_refused(density):
    with pytest.raises(DeltaflError, match=r"ties: density is .*; it must be in \[0, 1\]"):
        Ties(density)


def test_an_unknown_merge_is_refused():
    with pytest.raises(DeltaflError, match="mean or sum"):
        Ties(merge="max")  # type: ignore[arg-type]


def test_a_density_for_each_model_and_tensor():
    deltas = rows(3)
    found = apply(Ties({"a": [0.5, 0.25, 1.0], "*": [0.1, 1.0, 0.0]}, per_tensor=True), deltas)
    densities = [(0.5, 0.1), (0.25, 1.0), (1.0, 0.0)]
    kept = [
        np.concatenate([trimmed(row[:SPLIT], a), trimmed(row[SPLIT:], b)])
        for row, (a, b) in zip(deltas, densities, strict=True)
    ]
    assert_close(found, expected(np.array(kept), 1.0))
    whole = [trimmed(row, density) for row, density in zip(deltas, (0.5, 0.1, 0.0), strict=True)]
    assert_close(apply(Ties({"*": [0.5, 0.1, 0.0]}), deltas), expected(np.array(whole), 1.0))


def test_a_zero_sum_elects_plus_if_so_asked():
    deltas = np.tile(np.array([[1.0], [-3.0], [2.0]]), 6)
    assert not apply(Ties(1.0), deltas).any()
    assert_close(apply(Ties(1.0, zero_sum="positive"), deltas), np.full(6, 1.5))
    assert not apply(Ties(1.0, zero_sum="positive"), 0 * deltas).any()


@pytest.mark.parametrize(
    ("rule", "line"),
    [
        (lambda: Ties({"a": [1, 1]}), r'ties: density by tensor needs "\*" as its last pattern'),
        (
            lambda: apply(Ties({"a": [1, 1], "*": [1, 1]}), rows(2)),
            "ties: density by tensor needs per_tensor",
        ),
        (lambda: Ties({"*": [1, 2]}), "ties: density is 2"),
        (
            lambda: apply(Ties({"*": [0.5, 0.5]}), rows(3)),
            r'ties: density of "\*": 2 numbers for 3 models',
        ),
        (
            lambda: Ties(zero_sum="negative"),
            'ties: zero_sum is "negative"; it must be none or positive',
        ),
    ],
)
def test_densities_that_do_not_fit(rule, line):
    with pytest.raises(DeltaflError, match=line):
        rule()
