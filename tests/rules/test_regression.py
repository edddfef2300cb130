import numpy as np
import pytest
import torch

from deltafl.rules.regression import regressed

OUT, IN, N = 5, 4, 3


def problem(seed: int = 0, batch: tuple[int, ...] = ()) -> tuple[np.ndarray, np.ndarray]:
    """Deltas, (N, *batch, OUT, IN), and grams of inputs whose columns differ 1e3 times in size."""
    draw = np.random.default_rng(seed)
    inputs = draw.standard_normal((N, *batch, 20, IN)) * [1, 1e-2, 10, 1]
    return draw.standard_normal((N, *batch, OUT, IN)), np.swapaxes(inputs, -1, -2) @ inputs


def solve(cross, gram, prior, ridge):
    found, fell_back = regressed(*map(torch.tensor, (cross, gram, prior)), ridge)
    assert found.dtype == torch.float64
    return found.numpy(), fell_back


@pytest.mark.parametrize("ridge", [0.0, 1e-3, 1.0, 1e6])
def test_solves_the_normal_equations_of_each_matrix_of_a_batch(ridge):
    deltas, grams = problem(batch=(2, 3))
    cross, gram, prior = (deltas @ grams).sum(0), grams.sum(0), deltas.mean(0)
    found, fell_back = solve(cross, gram, prior, ridge)
    for at in np.ndindex(2, 3):
        size = ridge * np.trace(gram[at]) / IN
        wanted = (cross[at] + size * prior[at]) @ np.linalg.inv(gram[at] + size * np.eye(IN))
        np.testing.assert_allclose(found[at], wanted, rtol=1e-9)
    assert not fell_back


@pytest.mark.parametrize("ridge", [0.0, 1e-3])
def test_where_there_is_nothing_to_go_by_the_prior_stays(ridge):
    """With no input at all everywhere, with a dead one in its column."""
    deltas, grams = problem()
    prior = deltas.mean(0)
    found, fell_back = solve(0 * prior, np.zeros((IN, IN)), prior, ridge)
    np.testing.assert_allclose(found, prior)
    assert not fell_back
    grams[:, 2] = grams[:, :, 2] = 0
    found, fell_back = solve((deltas @ grams).sum(0), grams.sum(0), prior, 1e-3)
    np.testing.assert_allclose(found[:, 2], prior[:, 2])
    assert not fell_back


@pytest.mark.parametrize("broken", ["dependent", "negative", "nan"])
def test_a_singular_solve_falls_back_to_the_prior_alone_in_its_batch(broken):
    deltas, grams = problem(batch=(2,))
    gram, prior = grams.sum(0), deltas.mean(0)
    if broken == "dependent":  # the last input is a sum of others
        mix = np.eye(IN)
        mix[:, -1] = [1, 1, 1, 0]
        gram[1] = mix.T @ gram[1] @ mix
    else:
        gram[1, 0, 0] = {"negative": -1, "nan": np.nan}[broken]
    found, fell_back = solve((deltas @ grams).sum(0), gram, prior, 0.0)
    np.testing.assert_array_equal(found[1], prior[1])
    assert fell_back
    assert np.abs(found[0] - prior[0]).max() > 1e-3
