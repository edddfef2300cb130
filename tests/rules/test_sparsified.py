"""Rules that sparsify whole tensors before another rule merges them: breadcrumbs, della, dare by L1."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from deltafl.algebra.aggregate import Aggregate
from deltafl.algebra.deltas import Update
from deltafl.algebra.tensors import BLOCK
from deltafl.rules.breadcrumbs import Breadcrumbs
from deltafl.rules.dare import Dare
from deltafl.rules.della import Della
from deltafl.rules.median import Median
from deltafl.rules.rule import Rule, Source
from deltafl.rules.task_arithmetic import TaskArithmetic
from deltafl.rules.ties import Elect, Ties
from rules.oracle import merge, models
from rules.reference import apply, assert_close, integer_rows, rows

SHAPE = (300, 1000)
MEAN = TaskArithmetic()


def crumbs(values: np.ndarray, density: float, gamma: float) -> np.ndarray:
    """By the positions of an ascending sort, as mergekit states it; of equal ones the first last."""
    if density == 1:
        return values
    flat = values.ravel()
    order = np.argsort(-np.abs(flat), kind="stable")[::-1]
    count, top = int(density * flat.size), int(gamma * flat.size)
    bottom = max(0, flat.size - count - top)
    kept = np.isin(np.arange(flat.size), order[bottom : bottom + count])
    return np.where(kept, flat, 0).reshape(values.shape)


@pytest.mark.parametrize("inner", [MEAN, Median(), Elect("sum", "positive"), Ties(0.4)], ids=repr)
@pytest.mark.parametrize(
    ("density", "gamma"), [(0.5, 0.2), (0.9, 0.3), (0.05, 0.0), (0.0, 0.1), (1.0, 0.5)]
)
def test_breadcrumbs_drops_the_ends_of_a_sort_and_hands_on_the_rest(density, gamma, inner: Rule):
    for deltas in (models(3), [{k: np.round(v) for k, v in d.items()} for d in models(3)]):
        seen = [{k: crumbs(v, density, gamma) for k, v in d.items()} for d in deltas]
        found, wanted = merge(Breadcrumbs(density, gamma, inner), deltas), merge(inner, seen)
        for name, values in wanted.items():
            np.testing.assert_allclose(found[name], values, atol=1e-12, err_msg=name)


def test_breadcrumbs_by_model_and_tensor():
    density, gamma = {"ta*": [1.0, 0.5], "*": [0.3, 0.8]}, {"*": [0.1, 0.2]}
    deltas = models(2)
    for i in range(2):
        updates = [Update({k: torch.tensor(v) for k, v in d.items()}, Source("m")) for d in deltas]
        found = Aggregate(Breadcrumbs(density, gamma), updates, [float(i == 0), float(i == 1)])
        for name, values in deltas[i].items():
            share = density["ta*" if name in ("tall", "table") else "*"][i]
            wanted = crumbs(values, share, gamma["*"][i])
            np.testing.assert_allclose(found[name].numpy(), wanted, atol=1e-6)


def alone(rule: Rule, values: torch.Tensor, name: str = "a") -> torch.Tensor:
    return Aggregate(rule, [Update({name: values}, Source("m"))])[name]


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [SHAPE, (BLOCK + 5,), (300, 250, 2, 2)])
def test_della_keeps_by_rank_along_the_second_dimension(shape):
    """p = density - epsilon + 2 epsilon r / (k - 1); a third of the ranks each, five standard deviations."""
    values = normal(*shape)
    found = alone(Della(0.4, 0.3, MEAN, rescale="none"), values)
    axis = min(1, values.dim() - 1)
    size = shape[axis]
    ranks = values.abs().numpy().argsort(axis, kind="stable").argsort(axis)
    probability = 0.1 + 0.6 * ranks / (size - 1)
    kept = (found != 0).numpy()
    assert (found[torch.tensor(kept)] == values[torch.tensor(kept)]).all()
    for low in (0, 1 / 3, 2 / 3):
        part = (ranks >= low * size) & (ranks < (low + 1 / 3) * size)
        p, n = probability[part], part.sum()
        assert abs(kept[part].mean() - p.mean()) < 5 * np.sqrt((p * (1 - p)).mean() / n)


def test_della_rescales_by_l1_or_by_the_probability():
    values = normal(*SHAPE)
    by_l1 = alone(Della(0.4, 0.3, MEAN), values)
    plain = alone(Della(0.4, 0.3, MEAN, rescale="none"), values)
    factor = values.abs().double().sum() / plain.abs().double().sum()
    torch.testing.assert_close(by_l1, plain * float(factor))
    by_probability = alone(Della(0.4, 0.3, MEAN, rescale="probability"), values)
    ranks = values.abs().argsort(dim=1, stable=True).argsort(1)
    wanted = plain / (0.1 + 0.6 * ranks / (SHAPE[1] - 1))
    torch.testing.assert_close(by_probability, wanted.float(), rtol=2e-4, atol=0)  # p to 2^-16


def test_della_of_density_0_and_1_and_of_rows_of_one():
    values = normal(5, 1)
    assert torch.equal(alone(Della(1.0, 0.9, MEAN), values), values)
    assert not alone(Della(0.0, 0.9, MEAN), values).any()
    column = alone(Della(0.5, 0.1, MEAN, rescale="none"), normal(20_000, 1))
    assert abs(float((column != 0).double().mean()) - 0.5) < 5 * 0.5 / np.sqrt(20_000)


@pytest.mark.parametrize("rule", [Della(0.5, 0.2, MEAN), Dare(0.5, rescale="l1")], ids=repr)
def test_draws_of_whole_tensors_are_keyed_by_seed_model_and_tensor(rule: Della | Dare):
    values = normal(*SHAPE)
    first = alone(rule, values)
    assert torch.equal(first, alone(rule, values))
    other = Aggregate(rule, [Update({"a": values}, Source(n)) for n in "mn"], [0.0, 1.0])["a"]
    for different in (alone(replace(rule, seed=1), values), alone(rule, values, "b"), other):
        share = float(((different != 0) == (first != 0)).double().mean())
        assert 0.4 < share < 0.6  # of independent masks about 0.5 (1/2 + the variance of p)


@pytest.mark.parametrize("size", [1000, BLOCK + 1000])
def test_dare_rescales_by_l1_or_not_at_all(size):
    values = normal(size)
    plain = alone(Dare(0.7, rescale="none"), values)
    assert {*(plain / values).unique().tolist()} == {0.0, 1.0}
    by_l1 = alone(Dare(0.7, rescale="l1"), values)
    kept = by_l1 != 0
    assert abs(float(kept.double().mean()) - 0.3) < 5 * np.sqrt(0.21 / size)
    ratios = by_l1[kept] / values[kept]
    torch.testing.assert_close(ratios, ratios[:1].expand_as(ratios))
    torch.testing.assert_close(by_l1.abs().double().sum(), values.abs().double().sum())
    nothing = alone(Dare(1 - 2**-16, rescale="l1"), normal(3))
    assert nothing.isfinite().all()


@pytest.mark.parametrize(
    ("rule", "outer"),
    [
        (Dare(0.5, rescale="l1"), Dare(0.5, Ties(0.2), rescale="l1")),
        (Breadcrumbs(0.5, 0.1), Breadcrumbs(0.5, 0.1, Ties(0.2))),
        (Della(0.5, 0.2, MEAN), Della(0.5, 0.2, Ties(0.2))),
    ],
    ids=repr,
)
def test_one_tensor_of_many_blocks_is_sparsified_and_then_trimmed(rule: Rule, outer: Rule):
    """Where a threshold is sought, its first blocks are read before the trim is known."""
    values = normal(2 * BLOCK + 5)
    assert torch.equal(alone(outer, values), alone(Ties(0.2), alone(rule, values)))


@pytest.mark.parametrize("merge_by", ["mean", "sum"])
@pytest.mark.parametrize("zero", ["none", "positive"])
def test_elect_is_ties_that_trims_nothing(merge_by, zero):
    for deltas in (rows(4), integer_rows(4)):
        wanted = apply(Ties(1.0, merge_by, zero_sum=zero), deltas, [1.0, 2.0, 1.0, 1.0])
        assert_close(apply(Elect(merge_by, zero), deltas, [1.0, 2.0, 1.0, 1.0]), wanted)
