"""Each rule against its formula in float64 numpy, written another way; weights are whole numbers."""

from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.stats import trim_mean

from deltafl.rules.cclip import CClip
from deltafl.rules.consensus import Consensus
from deltafl.rules.fedavg import FedAvg
from deltafl.rules.fedgma import FedGMA
from deltafl.rules.fednova import FedNova
from deltafl.rules.geometric_median import GeometricMedian
from deltafl.rules.krum import Krum, MultiKrum
from deltafl.rules.median import Median
from deltafl.rules.rule import Rule, Source
from deltafl.rules.task_arithmetic import TaskArithmetic
from deltafl.rules.ties import Ties
from deltafl.rules.trimmed_mean import TrimmedMean
from rules.reference import SPLIT, aggregate_of, apply, assert_close, integer_rows, rows

Reference = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""Deltas (n, m) and weights (n,) -> update (m,)."""

KNOWN = {
    "num_examples": [100, 300, 1600, 50, 700], "num_steps": [10, 40, 25, 3, 17],
    "momentum": [0.9, 0.0, 0.5, 0.8, 0.1], "lr": [0.1, 0.01, 0.05, 0.2, 0.1],
    "prox_mu": [1.0, 0.1, 2.0, 0.5, 3.0],
}  # fmt: skip


def mean(deltas: np.ndarray, weights: np.ndarray) -> np.ndarray:
    return weights @ deltas / weights.sum()


def by_examples(deltas: np.ndarray, weights: np.ndarray) -> np.ndarray:
    return mean(deltas, weights * KNOWN["num_examples"])


def by_work(kind: str) -> Reference:
    """||a||_1 by running each local solver: how often a step's gradient is in the displacement."""

    def run(steps: int, momentum: float, shrink: float) -> float:
        velocity, moved = np.zeros(steps), np.zeros(steps)
        for step in range(steps):
            velocity = momentum * velocity + np.eye(steps)[step]
            moved = moved - shrink * moved + velocity
        return moved.sum()

    momenta = KNOWN["momentum"] if kind == "momentum" else [0] * 5
    shrinks = np.array(KNOWN["lr"]) * KNOWN["prox_mu"] * (kind == "prox")
    work = np.array(
        [run(*known) for known in zip(KNOWN["num_steps"], momenta, shrinks, strict=True)]
    )
    return lambda deltas, w: (w @ work) / w.sum() * mean(deltas / work[:, None], w)


def softened(rho: Fraction) -> Reference:
    """The comparison in fractions."""

    def update(deltas: np.ndarray, weights: np.ndarray) -> np.ndarray:
        votes = [abs(Fraction(int(v), int(weights.sum()))) for v in weights @ np.sign(deltas)]
        return mean(deltas, weights) * [1 if v >= rho else float(v) for v in votes]

    return update


def needed(threshold: Fraction, least: int) -> Reference:
    """TALL masks; the comparison in fractions."""

    def update(deltas: np.ndarray, weights: np.ndarray) -> np.ndarray:
        pairs = zip(weights.tolist(), deltas, strict=True)
        parts = np.array([[w * Fraction(x) for x in row] for w, row in pairs if w])
        total = parts.sum(0)
        votes = (abs(parts) >= threshold * abs(total - parts)).sum(0)
        return np.where(votes >= min(least, len(parts)), mean(deltas, weights), 0)

    return update


def middle(deltas: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """A model of weight 3 is three models."""
    return np.median(np.repeat(deltas, weights, axis=0), axis=0)


def lower_middle(deltas: np.ndarray, weights: np.ndarray) -> np.ndarray:
    return np.sort(np.repeat(deltas, weights, axis=0), axis=0)[(weights.sum() - 1) // 2]


def trimmed(trim: int) -> Reference:
    def update(deltas: np.ndarray, weights: np.ndarray) -> np.ndarray:
        n = (weights > 0).sum()
        return trim_mean(np.repeat(deltas, weights * n, axis=0), (trim + 1e-9) / n)

    return update


def clipped(rho: float, iterations: int, quantile: bool = False) -> Reference:
    """With explicit vectors."""

    def update(deltas: np.ndarray, weights: np.ndarray) -> np.ndarray:
        norms, centre = np.linalg.norm(deltas[weights > 0], axis=1), np.zeros(deltas.shape[1])
        radius = np.quantile(norms, rho) if quantile else rho
        for _ in range(iterations):
            away = deltas - centre
            norms = np.linalg.norm(away, axis=1).clip(1e-300)
            centre = centre + mean(away * np.minimum(1, radius / norms)[:, None], weights)
        return centre

    return update


def nearest(f: int, selected: int | None) -> Reference:
    """By explicit distance loops."""

    def update(deltas: np.ndarray, weights: np.ndarray) -> np.ndarray:
        alive = np.flatnonzero(weights)
        scores = {}
        for i in alive:
            squares = sorted(((deltas[i] - deltas[j]) ** 2).sum() for j in alive if j != i)
            scores[i] = sum(squares[: len(alive) - f - 2])
        kept = sorted(alive, key=scores.__getitem__)[: selected or len(alive) - f]
        return mean(deltas[kept], weights[kept])

    return update


def keep(row: np.ndarray, density: float) -> np.ndarray:
    """The k = int(density * size), at least 1, largest, of equal ones the first."""
    k = max(1, int(density * len(row))) if density else 0
    kept = np.argsort(-np.abs(row), kind="stable")[:k]
    return np.where(np.isin(np.arange(len(row)), kept), row, 0)


def elected(densities, merge: str = "mean", per_tensor: bool = False, zero: int = 0) -> Reference:
    """densities: of the two tensors, one for all models or one for each."""

    def trimmed(row: np.ndarray, first: float, rest: float) -> np.ndarray:
        if per_tensor:
            return np.concatenate([keep(row[:SPLIT], first), keep(row[SPLIT:], rest)])
        return keep(row, rest)

    def update(deltas: np.ndarray, weights: np.ndarray) -> np.ndarray:
        shares = np.broadcast_to(np.transpose(densities), (len(deltas), 2))
        kept = np.array([trimmed(d, *pair) for d, pair in zip(deltas, shares, strict=True)])
        signs = np.sign(weights @ kept)
        signs[signs == 0] = zero
        agree = (np.sign(kept) == signs) & (signs != 0)
        total = weights @ (kept * agree)
        counted = weights @ agree if merge == "mean" else weights.sum()
        return total / np.maximum(counted, 1)

    return update


EACH = [0.5, 0.25, 1.0, 0.1, 0.0]
CASES: list[tuple[Rule, Reference]] = [
    (TaskArithmetic(), mean),
    (FedAvg(), by_examples),
    *((FedNova(kind), by_work(kind)) for kind in ("sgd", "momentum", "prox")),
    *((FedGMA(float(r)), softened(r)) for r in map(Fraction, ("0", "1/3", "1/2", "0.6", "5/6", "1"))),
    *((Consensus(t, k), needed(Fraction(str(t)), k)) for t in (0.2, 0.4, 1.0, 5.0) for k in (0, 1, 2, 3)),
    (Median(), middle),
    (Median("lower"), lower_middle),
    *((TrimmedMean(trim), trimmed(trim)) for trim in (0, 1)),
    *((CClip(rho, iterations=n), clipped(rho, n)) for rho in (0.3, 5.0, 1e3) for n in (1, 2, 7)),
    *((CClip(q, "quantile"), clipped(q, 1, quantile=True)) for q in (0.0, 0.25, 0.6, 1.0)),
    *((Ties(d, m), elected(d, m)) for d in (0.0, 0.05, 0.2, 0.7, 1.0) for m in ("mean", "sum")),
    *((Ties(d, per_tensor=True), elected(d, per_tensor=True)) for d in (0.05, 0.7)),
    (Ties(0.7, zero_sum="positive"), elected(0.7, zero=1)),
    (Ties({"*": EACH}), elected([EACH, EACH])),
    (Ties({"a": EACH, "*": EACH[::-1]}, per_tensor=True), elected([EACH, EACH[::-1]], per_tensor=True)),
]  # fmt: skip
WEIGHTS = (None, [1, 2, 3, 1, 2], [0, 1, 2, 1, 1], [3, 3, 2, 1, 1])


def coarse_rows(n: int) -> np.ndarray:
    """Values with 3 bits of mantissa: many are equal, some are 0."""
    values = (rows(n).astype(np.float32).view(np.uint32) & 0xFFF00000).view(np.float32)
    return np.where(np.abs(values) < 0.1, 0, values).astype(np.float64)


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
@pytest.mark.parametrize("make", [rows, integer_rows, coarse_rows])
@pytest.mark.parametrize(
    ("rule", "reference"), CASES, ids=lambda x: repr(x) if isinstance(x, Rule) else ""
)
def test_a_rule_is_its_formula(rule, reference, make, weights):
    deltas = make(5)
    wanted = reference(deltas, np.array(weights or [1] * 5))
    assert_close(apply(rule, deltas, weights and [float(w) for w in weights], **KNOWN), wanted)


@pytest.mark.parametrize("weights", [None, [1, 2, 3, 4, 5, 6, 7, 0, 2]], ids=str)
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    ("rule", "f", "selected"),
    [(Krum(0), 0, 1), (Krum(2), 2, 1), (MultiKrum(1), 1, None), (MultiKrum(2, 3), 2, 3)],
)
def test_krum_averages_the_lowest_scores(rule, f, selected, seed, weights):
    deltas = rows(9, seed=seed)
    wanted = nearest(f, selected)(deltas, np.array(weights or [1] * 9))
    assert_close(apply(rule, deltas, weights and [float(w) for w in weights]), wanted)


@pytest.mark.parametrize("n", range(1, 18))
def test_medians_and_trimmed_means_of_any_number_of_models_are_exact(n):
    """Of 2^10 columns of zeros and ones too, by which a network that sorts is known (Knuth vol. 3, 5.3.4)."""
    bits = np.random.default_rng(n).integers(0, 2, (n, 2**10)).astype(np.float64)
    for deltas in (rows(n), integer_rows(n), bits):
        ordered = np.sort(deltas, axis=0)
        wanted = np.median(deltas.astype(np.float32), axis=0)
        np.testing.assert_array_equal(apply(Median(), deltas), wanted)
        np.testing.assert_array_equal(apply(Median("lower"), deltas), ordered[(n - 1) // 2])
        for trim in range(1, (n + 1) // 2):
            kept = ordered[trim : n - trim].mean(0)
            np.testing.assert_allclose(apply(TrimmedMean(trim), deltas), kept, atol=1e-6)


@pytest.mark.parametrize("tenths", range(11))
@pytest.mark.parametrize("n", [1, 2, 3, 7, 10])
def test_agreement_is_compared_exactly(n, tenths):
    """In floats 0.1 * 6 > 0.6, so that a coordinate at A = rho would be softened."""
    wanted = softened(Fraction(tenths, 10))(integer_rows(n), np.ones(n, int))
    assert_close(apply(FedGMA(tenths / 10), integer_rows(n)), wanted)


@pytest.mark.parametrize("weights", [None, [1.0, 2.0, 1.0, 0.5, 1.5], [1.0, 1.0, 9.0, 1.0, 0.0]])
def test_the_geometric_median_minimises_the_sum_of_distances(weights):
    deltas, p = rows(5, 12), np.array(weights or [1.0] * 5)

    def cost(z: np.ndarray) -> float:
        return float(p @ np.linalg.norm(deltas - z, axis=1))

    best = minimize(cost, mean(deltas, p), method="BFGS", options={"gtol": 1e-9})
    # Where a delta is the minimum, a smoothing of 1e-6 of the norms, here 4, costs about as much.
    assert cost(apply(GeometricMedian(), deltas, weights)) <= best.fun + 1e-5


def test_of_the_closest_pair_krum_chooses_the_one_nearer_to_the_rest():
    """n = 3, f = 0: a score is one distance, and the closest two share it."""
    deltas = np.array([[9.0] * 6, [1.0] * 6, [2.0] * 6])
    assert_close(apply(Krum(), deltas), deltas[2])
    assert_close(apply(Krum(), deltas[::-1]), deltas[2])


@pytest.mark.parametrize("n", range(2, 12))
def test_deltas_that_cancel_elect_nothing(n):
    """1 + 2 + .. - total = 0; a sum of weighted, rounded terms is not always 0."""
    column = np.arange(1.0, n + 1)
    column[-1] = -column[:-1].sum()
    for scale in (1.0, 173.0, 0.75):  # products that float32 holds exactly
        assert not apply(Ties(1.0), np.tile(scale * column[:, None], 6)).any()


@pytest.mark.parametrize(("per_tensor", "kept", "share"), [(False, 3, 0.3), (True, 1, 0.2)])
def test_of_values_equal_to_the_threshold_of_ties_the_first_are_kept(per_tensor, kept, share):
    """Of the two tensors, of 4 and 6 elements, exactly 3 in all, or 1 each."""
    deltas = np.ones((2, 10))
    deltas[1] = np.arange(1, 11)
    found = aggregate_of(Ties(0.3, per_tensor=per_tensor), deltas, [1.0, 0.0])
    assert found.report["kept_fraction"] == {"m0": share, "m1": share}
    assert [found["a"].tolist(), found["b"].tolist()] == [
        [1.0] * kept + [0.0] * (4 - kept),
        [float(per_tensor)] + [0.0] * 5,
    ]


def test_a_tiny_proximal_term_is_sgd():
    """(1 - (1 - x)^tau) / x would lose all digits at x = 1e-15."""
    source = Source("m", num_steps=4000, lr=1e-6, prox_mu=1e-9)
    assert FedNova("prox").work(source) == pytest.approx(4000, rel=1e-11)
