import numpy as np
import pytest

from deltafl.rules.wudi import Wudi
from rules.oracle import KINDS, MATRICES, assert_is, merge, models


def expected(
    matrices: list[np.ndarray], p: np.ndarray, ridge: float, prior: str = "mean"
) -> np.ndarray:
    """The minimum by least squares, of the rows of all models and those of the ridge."""
    n, size = len(matrices), matrices[0].shape[1]
    units = [np.sqrt(w) * m / (np.linalg.norm(m) or 1) for w, m in zip(p, matrices, strict=True)]
    mean = np.einsum("n,noi->oi", p, np.array(matrices))
    start = mean * (n if prior == "sum" else 1)
    lam = ridge * sum((u**2).sum() for u in units) / size
    if lam == 0:
        return mean
    left = np.vstack([*units, np.sqrt(lam) * np.eye(size)])
    right = np.vstack(
        [*(u @ m.T for u, m in zip(units, matrices, strict=True)), np.sqrt(lam) * start.T]
    )
    return np.linalg.lstsq(left, right, rcond=None)[0].T / (n if prior == "sum" else 1)


@pytest.mark.parametrize("prior", ["mean", "sum"])
@pytest.mark.parametrize("ridge", [1e-2, 1.0, 1e4])
@pytest.mark.parametrize("kind", KINDS)
def test_is_the_minimum(kind, ridge, prior):
    rule = Wudi(ridge, prior)
    for n in (1, 2, 5):
        assert_is(rule, models(n, kind), lambda m, p: expected(m, p, ridge, prior))
    weights = [1.0, 2.0, 0.5]
    assert_is(rule, models(3, kind), lambda m, p: expected(m, p, ridge, prior), weights)


def test_no_ridge_is_the_exact_minimum_and_the_prior_where_that_is_not_one():
    deltas = models(3)
    tall = [d["tall"] for d in deltas]
    grams = [m.T @ m / np.linalg.norm(m) ** 2 for m in tall]
    exact = sum(m @ g for m, g in zip(tall, grams, strict=True)) @ np.linalg.inv(sum(grams))
    found = merge(Wudi(0.0), deltas)
    np.testing.assert_allclose(found["tall"], exact, rtol=1e-6)
    deltas = models(3, "rank 1")
    np.testing.assert_allclose(
        merge(Wudi(0.0), deltas)["tall"], np.mean([d["tall"] for d in deltas], 0)
    )


def test_a_large_ridge_is_task_arithmetic_and_the_scale_of_the_deltas_does_not_matter():
    deltas = models(3)
    tiny = [{k: v * 2**-40 for k, v in d.items()} for d in deltas]
    for prior in ("mean", "sum"):
        found, small = merge(Wudi(1e12, prior), deltas), merge(Wudi(1.0, prior), tiny)
        for name, value in merge(Wudi(1.0, prior), deltas).items():
            mean = np.mean([d[name] for d in deltas], 0)
            if name not in MATRICES and prior == "sum":
                mean /= 3
            np.testing.assert_allclose(found[name], mean, atol=1e-9)
            np.testing.assert_allclose(small[name] * 2**40, value, rtol=1e-9)
