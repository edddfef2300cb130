import numpy as np
import pytest

from deltafl.errors import DeltaflError
from deltafl.rules.krum import Krum, MultiKrum
from rules.reference import aggregate_of, apply, assert_close, rows, shares


def ranking(deltas: np.ndarray, f: int) -> list[int]:
    """Models by Krum score, with explicit distance loops; no two scores of these deltas are equal."""
    n, scores = len(deltas), []
    for i in range(n):
        squares = sorted(float(((deltas[i] - deltas[j]) ** 2).sum()) for j in range(n) if j != i)
        scores.append(sum(squares[: n - f - 2]))
    assert len(set(scores)) == n
    return sorted(range(n), key=lambda i: scores[i])


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("n", "f"), [(4, 0), (5, 1), (8, 2), (9, 3)])
def test_krum_returns_the_delta_of_lowest_score(n, f, seed):
    deltas = rows(n, seed=seed)
    assert_close(apply(Krum(f), deltas), deltas[ranking(deltas, f)[0]])


@pytest.mark.parametrize("selected", [None, 1, 3, 8])
@pytest.mark.parametrize("weights", [None, [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]])
def test_multi_krum_averages_the_lowest_scores(weights, selected):
    deltas, f = rows(8), 2
    kept = ranking(deltas, f)[: 8 - f if selected is None else selected]
    p = shares(weights, 8)[kept]
    assert_close(apply(MultiKrum(f, selected), deltas, weights), p @ deltas[kept] / p.sum())


def test_attackers_are_never_chosen():
    deltas = rows(7)
    deltas[[1, 4]] = 100.0 + rows(2)
    assert aggregate_of(Krum(2), deltas).report["coefficients"][1::3] == [0.0, 0.0]
    assert aggregate_of(MultiKrum(2), deltas).report["coefficients"][1::3] == [0.0, 0.0]


def test_of_the_closest_pair_the_one_nearer_to_the_rest_is_chosen():
    """n = 3, f = 0: a score is one distance, and the closest two share it."""
    deltas = np.array([[9.0] * 6, [1.0] * 6, [2.0] * 6])
    assert_close(apply(Krum(), deltas), deltas[2])
    assert_close(apply(Krum(), deltas[::-1]), deltas[2])


def test_a_model_of_weight_0_is_not_chosen_and_does_not_count():
    deltas = rows(5)
    deltas[4] = deltas[:4].mean(0)
    without = ranking(deltas[:4], 0)
    assert ranking(deltas, 0)[0] == 4
    assert_close(apply(Krum(), deltas, [1.0] * 4 + [0.0]), deltas[without[0]])
    with pytest.raises(DeltaflError, match="4 models of weight above 0 with num_byzantine 1"):
        apply(Krum(1), deltas, [1.0] * 4 + [0.0])


@pytest.mark.parametrize("rule", [Krum, MultiKrum])
@pytest.mark.parametrize(("n", "f"), [(2, 0), (4, 1), (6, 2)])
def test_too_few_models_are_refused(rule, n, f):
    with pytest.raises(
        DeltaflError, match=f"{n} models .* num_byzantine {f}; .* at least 2f \\+ 3 = {2 * f + 3}"
    ):
        apply(rule(f), rows(n))


@pytest.mark.parametrize("selected", [0, 6])
def test_num_selected_is_checked(selected):
    with pytest.raises(DeltaflError, match=f"num_selected is {selected}; it must be in 1 to 5"):
        apply(MultiKrum(0, selected), rows(5))
