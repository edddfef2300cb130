import numpy as np
import pytest
import torch

from deltafl.algebra.aggregate import Aggregate
from deltafl.algebra.deltas import Update
from deltafl.algebra.tensors import BLOCK
from deltafl.errors import DeltaflError
from deltafl.rules.cclip import CClip
from deltafl.rules.dare import LEVELS, Dare, Drop
from deltafl.rules.median import Median
from deltafl.rules.rule import Source, Threshold
from deltafl.rules.task_arithmetic import TaskArithmetic
from deltafl.rules.ties import Ties
from rules.reference import apply, assert_close, rows

MANY = 200_000


def dropped(
    rate: float, seed: int = 0, model: int = 0, name: str = "a", start: int = 0
) -> torch.Tensor:
    return Drop(rate, seed).apply(torch.ones(MANY), model, name, start, Threshold())


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5, 0.9, 0.99])
def test_the_dropped_share_is_p_and_the_rest_is_rescaled(rate):
    values = dropped(rate)
    exact_rate = round(rate * LEVELS) / LEVELS
    assert set(values.unique().tolist()) <= {0.0, float(np.float32(1 / (1 - exact_rate)))}
    share = float((values == 0).double().mean())
    # Five standard deviations of a binomial share; 0 of them where nothing is random.
    assert abs(share - exact_rate) <= 5 * np.sqrt(exact_rate * (1 - exact_rate) / MANY)
    assert abs(float(values.double().mean()) - 1) <= 5 * np.sqrt(
        exact_rate / (1 - exact_rate) / MANY
    )


def test_draws_are_keyed_by_seed_model_tensor_and_block():
    first = dropped(0.5)
    assert torch.equal(first, dropped(0.5))
    for other in ({"seed": 1}, {"model": 1}, {"name": "b"}, {"start": BLOCK}):
        # Independent masks at p = 1/2 agree on half of the coordinates.
        agreement = float((dropped(0.5, **other) == first).double().mean())
        assert abs(agreement - 0.5) < 5 * 0.5 / np.sqrt(MANY)


@pytest.mark.parametrize("inner", [TaskArithmetic(), Median(), CClip(1.0), Ties(0.3)], ids=repr)
def test_the_inner_rule_and_its_reductions_see_the_dropped_deltas(inner):
    deltas = rows(3)
    drop = Drop(0.5, 7)
    seen = deltas.copy()
    for i, row in enumerate(seen):
        row[:4] = drop.apply(torch.tensor(row[:4]), i, "a", 0, Threshold()).numpy()
        row[4:] = drop.apply(torch.tensor(row[4:]), i, "b", 0, Threshold()).numpy()
    assert (seen == 0).sum() > 40
    assert_close(apply(Dare(0.5, inner, seed=7), deltas), apply(inner, seen))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_inf_are_refused_even_where_they_are_dropped(value):
    rule = Dare(0.99)
    at = int((dropped(0.99)[:1000] == 0).nonzero()[0])
    delta = torch.zeros(1000)
    delta[at] = value
    with pytest.raises(DeltaflError, match=f'model "m": tensor "a" .* NaN or Inf .element {at}.'):
        dict(Aggregate(rule, [Update({"a": delta}, Source("m"))]))


def test_a_drop_rate_for_each_model_and_tensor():
    rates = {"a": [0.0, 0.5], "*": [0.75, 0.0]}
    ones = [
        Update({"a": torch.ones(MANY), "b": torch.ones(MANY)}, Source(name))
        for name in ("first", "second")
    ]
    for i, (a, b) in enumerate([(1.0, 0.25), (0.5, 1.0)]):
        found = dict(Aggregate(Dare(rates), ones, [float(i == 0), float(i == 1)]))
        for name, kept in (("a", a), ("b", b)):
            assert set(found[name].unique().tolist()) == ({1.0} if kept == 1 else {0.0, 1 / kept})
            share = float((found[name] > 0).double().mean())
            assert abs(share - kept) <= 5 * np.sqrt(kept * (1 - kept) / MANY)
