"""Aggregates and steps: what weights, scales, dtypes and orders mean; nothing is modified."""

import math

import pytest
import torch

from checkpoint_files import fails
from deltafl.algebra.aggregate import Aggregate, aggregate, step
from deltafl.algebra.deltas import Update
from deltafl.errors import DeltaflError
from deltafl.rules.median import Median
from deltafl.rules.rule import Source
from deltafl.rules.task_arithmetic import TaskArithmetic
from deltafl.rules.ties import Ties
from deltafl.rules.weights import as_weights, total_weight
from laws.worlds import ByBlocks, assert_same, make, result

MEAN = TaskArithmetic()


def updates(*deltas) -> list[Update]:
    return [Update(d, Source(f"m{i}")) for i, d in enumerate(deltas)]


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (2.0, 0.5, -1.0)])
@pytest.mark.parametrize("server_lr", [1.0, 0.3, -2.0, 0.0])
def test_step_adds_the_mean_times_server_lr_and_modifies_nothing(server_lr, weights):
    """Lambda multiplies the sum: server_lr = lambda * sum_i |w_i|."""
    world = make(3, seed=0)
    base = {name: 1 + t for name, t in make(1, 99).deltas[0].items()}
    before, deltas = {n: t.clone() for n, t in base.items()}, world.mapped(torch.clone).deltas
    moved = dict(step(base, world.updates, MEAN, server_lr, weights))
    coef = server_lr / total_weight(as_weights(weights, 3))
    for name in base:
        total = sum(w * d[name].double() for w, d in zip(weights, world.deltas, strict=True))
        wanted = base[name].double() + coef * total
        torch.testing.assert_close(moved[name].double(), wanted, rtol=1e-6, atol=2e-6)
    for now, then in zip((base, *world.deltas), (before, *deltas), strict=True):
        assert_same(now, then)


def test_the_sum_is_added_to_a_16_bit_base_once():
    """40 deltas of a quarter of bfloat16's spacing at 1 (2^-7): added one at a time each would be lost."""
    base = {"w": torch.ones(8, dtype=torch.bfloat16)}
    deltas = [{"w": torch.full((8,), 2**-9, dtype=torch.bfloat16)}] * 40
    moved = dict(step(base, updates(*deltas), MEAN, server_lr=40.0))
    assert_same(moved, {"w": torch.full((8,), 1 + 40 * 2**-9, dtype=torch.bfloat16)})


def test_order_dtypes_integers_and_what_is_not_updated_are_the_bases():
    """16777217 is not a float32; a third is not one either."""
    base = {
        "a": torch.ones(2, dtype=torch.float16),
        "b": torch.ones(0, 3),
        "c": torch.tensor(1.0).bfloat16(),
        "steps": torch.tensor([2**24 + 1, 7]),
        "mask": torch.tensor([True, False]),
        "wide": torch.tensor([1 / 3], dtype=torch.float64),
    }
    delta = {"c": torch.tensor(1.0), "b": torch.ones(0, 3), "steps": torch.tensor([5, 5])}
    moved = dict(step(base, updates(delta | {"wide": torch.zeros(1)}), MEAN))
    assert_same(moved, base | {"c": torch.tensor(2.0).bfloat16()})


def test_deltas_must_agree_in_names_and_shapes_and_all_problems_are_told():
    one = torch.ones(2)
    deltas = {"w": one, "v": torch.ones(3)}, {"w": one}, {"w": one, "v": torch.ones(4)}
    with pytest.raises(DeltaflError) as error:
        Aggregate(MEAN, updates(*deltas))
    assert error.value.problems == (
        '"m1" and "m0" differ in tensors: "v"',
        'tensor "v" is (4,) in "m2", (3,) in "m0"',
    )
    with pytest.raises(DeltaflError, match='the base lacks tensors of the update: "v"'):
        dict(step({"w": one}, updates(deltas[0]), MEAN))
    fails("no models", Aggregate, MEAN, [])
    with pytest.raises(DeltaflError, match="do not fit into float16"):
        dict(step({"w": one.half()}, updates({"w": one * 1e5}), MEAN))


def test_the_first_delta_gives_the_order_of_tensors_and_names_cost_no_read():
    one, two = (ByBlocks({n: torch.ones(1) for n in names}) for names in ("ba", "ab"))
    update = Aggregate(MEAN, updates(one, two))
    assert ("a" in update, "v" in update, list(update)) == (True, False, ["b", "a"])
    assert one.reads == two.reads == 0


def test_views_and_tensors_that_need_gradients_are_read_as_values():
    values = torch.randn(4, 6)
    plain = dict(aggregate(Ties(0.5), updates({"w": values}, {"w": values * 2})))
    odd = {"w": values.t().contiguous().t()}, {"w": torch.nn.Parameter(values * 2)}
    merged = dict(aggregate(Ties(0.5), updates(*odd)))
    assert_same(merged, plain)
    assert not merged["w"].requires_grad


@pytest.mark.parametrize("rule", [MEAN, Median()])
def test_the_first_matching_pattern_gives_the_weights(rule):
    weights = {"*.weight": (1, 3), "layer.*": (-1, 0), "scale": (0, 0), "*": (1, 1)}
    world = make(2, seed=5)
    update = result(rule, world, weights)
    for name, row in (("layer.weight", (1, 3)), ("layer.bias", (-1, 0)), ("nothing", (1, 1))):
        assert torch.equal(update[name], result(rule, world, row)[name])
        assert total_weight(as_weights(weights, 2), name) == sum(map(abs, row))
    assert not update["scale"].any()


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1.0, 2.0], "2 numbers for 3 models"),
        ([1.0, math.nan, 1.0], "not finite"),
        ([1.0, math.inf, 1.0], "not finite"),
        ([0.0, 0.0, 0.0], "all are 0"),
        ({"x": [1.0], "*": [1.0] * 3}, 'weights of "x": 1 numbers for 3 models'),
        ({"x": [1.0] * 3}, "needs .* as its last pattern"),
        ({"x": [0.0] * 3, "*": [0.0] * 3}, "all are 0"),
    ],
)
def test_weights_are_checked(weights, message):
    fails(message, as_weights, weights, 3)
