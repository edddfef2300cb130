import numpy as np
import pytest

from deltafl.errors import DeltaflError
from deltafl.rules.fednova import FedNova
from deltafl.rules.rule import Source
from rules.reference import apply, assert_close, rows, shares

STEPS = [10, 40, 25]
WEIGHTS = [None, [1.0, 2.0, 3.0]]


def momentum_work(steps: int, momentum: float) -> float:
    """||a||_1 by running heavy-ball SGD: how often each step's gradient is in the final displacement."""
    velocity, moved = np.zeros(steps), np.zeros(steps)
    for t in range(steps):
        velocity = momentum * velocity + np.eye(steps)[t]
        moved += velocity
    return moved.sum()


def prox_work(steps: int, lr: float, mu: float) -> float:
    """||a||_1 by running w <- w - lr (g_t + mu (w - w0)), in units of lr."""
    moved = np.zeros(steps)
    for t in range(steps):
        moved = moved - lr * mu * moved + np.eye(steps)[t]
    return moved.sum()


def expected(deltas: np.ndarray, weights: list[float] | None, work: list[float]) -> np.ndarray:
    p, a = shares(weights, len(deltas)), np.array(work)
    return (p @ a) * ((p / a) @ deltas)


@pytest.mark.parametrize("weights", WEIGHTS)
def test_sgd_divides_by_the_number_of_steps(weights):
    deltas = rows(3)
    assert_close(
        apply(FedNova(), deltas, weights, num_steps=STEPS), expected(deltas, weights, STEPS)
    )


def test_equal_weights_give_the_form_of_the_one_shot_paper():
    deltas = rows(3)
    direct = sum(
        np.mean(STEPS) / (3 * tau) * delta for tau, delta in zip(STEPS, deltas, strict=True)
    )
    assert_close(apply(FedNova(), deltas, num_steps=STEPS), direct)


@pytest.mark.parametrize("weights", WEIGHTS)
def test_momentum_divides_by_what_heavy_ball_accumulates(weights):
    deltas, momenta = rows(3), [0.9, 0.0, 0.5]
    work = [momentum_work(tau, m) for tau, m in zip(STEPS, momenta, strict=True)]
    actual = apply(FedNova("momentum"), deltas, weights, num_steps=STEPS, momentum=momenta)
    assert_close(actual, expected(deltas, weights, work))


@pytest.mark.parametrize("weights", WEIGHTS)
def test_prox_divides_by_what_the_proximal_term_leaves(weights):
    deltas, rates, mus = rows(3), [0.1, 0.01, 0.05], [1.0, 0.1, 2.0]
    work = [prox_work(*x) for x in zip(STEPS, rates, mus, strict=True)]
    actual = apply(FedNova("prox"), deltas, weights, num_steps=STEPS, lr=rates, prox_mu=mus)
    assert_close(actual, expected(deltas, weights, work))


def test_a_tiny_proximal_term_is_sgd():
    """(1 - (1 - x)^tau) / x would lose all digits at x = 1e-15."""
    source = Source("m", num_steps=4000, lr=1e-6, prox_mu=1e-9)
    assert FedNova("prox").work(source) == pytest.approx(4000, rel=1e-11)


@pytest.mark.parametrize("steps", [None, 0, -1])
def test_missing_steps_name_model_and_flag(steps):
    with pytest.raises(DeltaflError, match=r'fednova: model "m1".*--num-steps') as error:
        apply(FedNova(), rows(3), num_steps=[10, steps, 20])
    assert len(error.value.problems) == 1


def test_every_missing_piece_is_reported_at_once():
    with pytest.raises(DeltaflError, match="momentum is None") as error:
        apply(FedNova("momentum"), rows(2), num_steps=[None, 5], momentum=[1.0, None])
    assert len(error.value.problems) == 3


@pytest.mark.parametrize(
    ("lr", "mu"), [(None, 1.0), (0.1, None), (0.1, 0.0), (1.0, 1.0), (-0.1, 1.0)]
)
def test_prox_needs_a_product_between_0_and_1(lr, mu):
    with pytest.raises(DeltaflError, match=r'"m0": lr is .*, prox_mu is'):
        apply(FedNova("prox"), rows(2), num_steps=[5, 5], lr=[lr, 0.1], prox_mu=[mu, 0.1])


def test_an_unknown_normalizer_is_refused():
    with pytest.raises(DeltaflError, match="it must be sgd, momentum or prox"):
        FedNova("adam")  # type: ignore[arg-type]
