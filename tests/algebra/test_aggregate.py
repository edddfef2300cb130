import math
from dataclasses import replace

import pytest
import torch

from deltafl.algebra.aggregate import (
    Aggregate,
    Stepped,
    Weights,
    aggregate,
    as_weights,
    step,
    sum_scale,
)
from deltafl.algebra.deltas import Update
from deltafl.algebra.tensors import BLOCK, Zeros
from deltafl.errors import DeltaflError
from deltafl.rules.median import Median
from deltafl.rules.rule import Source
from deltafl.rules.task_arithmetic import TaskArithmetic
from deltafl.rules.ties import Ties
from laws.worlds import ByBlocks, World, assert_same, flatten, make, result

MEAN = TaskArithmetic()


def updates(*deltas: dict[str, torch.Tensor]) -> list[Update]:
    return [Update(d, Source(f"m{i}")) for i, d in enumerate(deltas)]


def base_of(world: World, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    return {
        name: (1 + t).to(dtype)
        for name, t in make(1, 99).deltas[0].items()
        if name in world.deltas[0]
    }


def test_step_adds_the_mean_times_server_lr():
    world = make(3, seed=0)
    base = base_of(world)
    for server_lr in (1.0, 0.3, -2.0, 0.0):
        moved = dict(step(base, world.updates, MEAN, server_lr))
        for name in base:
            mean = torch.stack([d[name].double() for d in world.deltas]).mean(0)
            torch.testing.assert_close(
                moved[name].double(), base[name].double() + server_lr * mean, rtol=1e-6, atol=1e-6
            )


def test_lambda_multiplies_the_sum():
    """server_lr = lambda * n with equal weights; with others lambda multiplies sum_i w_i delta_i."""
    world, coef = make(3, seed=1), 0.25
    base = base_of(world)
    for weights in ((1.0, 1.0, 1.0), (2.0, 0.5, -1.0)):
        update = Aggregate(MEAN, world.updates, weights)
        moved = dict(Stepped(base, update, sum_scale(as_weights(weights, 3), coef)))
        for name in base:
            total = sum(w * d[name].double() for w, d in zip(weights, world.deltas, strict=True))
            torch.testing.assert_close(
                moved[name].double(), base[name].double() + coef * total, rtol=1e-6, atol=2e-6
            )
    assert sum_scale(as_weights(None, 3), coef)("any") == coef * 3


def test_the_sum_is_added_to_a_16_bit_base_once():
    """40 deltas of a quarter of bfloat16's spacing at 1 (2^-7): added one at a time each would be lost."""
    base = {"w": torch.ones(8, dtype=torch.bfloat16)}
    deltas = [{"w": torch.full((8,), 2**-9, dtype=torch.bfloat16)}] * 40
    moved = dict(step(base, updates(*deltas), MEAN, server_lr=40.0))
    assert moved["w"].dtype == torch.bfloat16
    assert moved["w"].tolist() == [1 + 40 * 2**-9] * 8


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_exact_step_is_the_float64_result_rounded_once(dtype):
    world = make(3, seed=2, scale=0.01)
    base = base_of(world, dtype)
    exact = Stepped(base, Aggregate(MEAN, world.updates, dtype=torch.float64), 0.7)
    for name, moved in exact.items():
        mean = sum(d[name].double() for d in world.deltas) / 3
        wanted = base[name].double() + 0.7 * mean
        neighbours = (moved.double() - wanted).abs()
        # Half a unit in the last place is the largest error of one rounding; the eps of a dtype is its unit at 1.
        unit = torch.finfo(dtype).eps * 2.0 ** wanted.abs().log2().floor()
        assert (neighbours <= unit * (0.5 + 1e-9)).all()


def test_integer_tensors_are_the_bases_own():
    """16777217 is not a float32."""
    steps = torch.tensor([2**24 + 1, 7])
    base = {"w": torch.ones(3), "steps": steps, "mask": torch.tensor([True, False])}
    delta = {"w": torch.ones(3), "steps": torch.tensor([5, 5])}
    for given in (delta, {"w": delta["w"]}):
        moved = dict(step(base, updates(given), MEAN))
        assert_same(moved, {"w": torch.full((3,), 2.0), "steps": steps, "mask": base["mask"]})


def test_the_base_gives_order_dtypes_and_what_is_not_updated():
    base = {
        "a": torch.ones(2, dtype=torch.float16),
        "b": torch.ones(0, 3),
        "c": torch.tensor(1.0).bfloat16(),
    }
    moved = dict(step(base, updates({"c": torch.tensor(1.0), "b": torch.ones(0, 3)}), MEAN))
    assert_same(moved, {"a": base["a"], "b": base["b"], "c": torch.tensor(2.0).bfloat16()})


def test_step_modifies_nothing():
    world = make(3, seed=3)
    base = base_of(world)
    copies = ({k: v.clone() for k, v in base.items()}, world.mapped(torch.clone))
    dict(step(base, world.updates, MEAN, 0.5))
    assert_same(base, copies[0])
    assert all(
        torch.equal(flatten(a), flatten(b))
        for a, b in zip(world.deltas, copies[1].deltas, strict=True)
    )


def test_step_streams_from_a_lazy_base():
    world = make(3, seed=4, shapes={"w": (BLOCK + 3,), "scale": ()})
    base = {"w": torch.randn(BLOCK + 3).bfloat16(), "scale": torch.tensor(2.0)}
    lazy = Stepped(ByBlocks(base), Aggregate(MEAN, world.updates), 0.5)
    assert_same({name: lazy[name] for name in base}, dict(step(base, world.updates, MEAN, 0.5)))


def test_an_update_that_the_base_lacks_is_an_error():
    with pytest.raises(DeltaflError, match='the base lacks tensors of the update: "extra"'):
        dict(
            step({"w": torch.ones(1)}, updates({"w": torch.ones(1), "extra": torch.ones(1)}), MEAN)
        )


def test_deltas_must_agree_in_names_and_shapes_and_all_problems_are_told():
    deltas = (
        {"w": torch.ones(2), "v": torch.ones(3)},
        {"w": torch.ones(2)},
        {"w": torch.ones(2), "v": torch.ones(4)},
    )
    with pytest.raises(DeltaflError) as error:
        Aggregate(MEAN, updates(*deltas))
    assert error.value.problems == (
        '"m1" and "m0" differ in tensors: "v"',
        'tensor "v" is (4,) in "m2", (3,) in "m0"',
    )


def test_the_first_delta_gives_the_order_of_tensors():
    one = {"b": torch.ones(1), "a": torch.zeros(1)}
    two = {"a": torch.zeros(1), "b": torch.ones(1)}
    assert [name for name, _ in aggregate(MEAN, updates(one, two))] == ["b", "a"]


def test_no_models_are_an_error():
    with pytest.raises(DeltaflError, match="no models"):
        Aggregate(MEAN, [])


def test_views_and_tensors_that_need_gradients_are_read_as_values():
    values = torch.randn(4, 6)
    plain = dict(aggregate(Ties(0.5), updates({"w": values}, {"w": values * 2})))
    odd = {"w": values.t().contiguous().t()}, {"w": torch.nn.Parameter(values * 2)}
    merged = dict(aggregate(Ties(0.5), updates(*odd)))
    assert_same(merged, plain)
    assert not merged["w"].requires_grad


def test_membership_computes_nothing():
    lazy = ByBlocks({"w": torch.ones(5)})
    update = Aggregate(MEAN, updates(lazy))
    assert "w" in update
    assert "v" not in update
    assert len(update) == 1
    assert lazy.reads == 0


def test_the_first_matching_pattern_gives_the_weights():
    world = replace(make(2, seed=5), weights=None)
    weights = Weights(
        (1.0, 1.0), (("*.weight", (1.0, 3.0)), ("layer.*", (-1.0, 0.0)), ("scale", (0.0, 0.0)))
    )
    for rule in (MEAN, Median()):
        update = result(rule, world, weights)
        for name, row in (
            ("layer.weight", (1.0, 3.0)),
            ("layer.bias", (-1.0, 0.0)),
            ("nothing", (1.0, 1.0)),
        ):
            assert torch.equal(update[name], result(rule, world, row)[name])
        assert not update["scale"].any()
    assert (weights.total("layer.weight"), weights.total("layer.bias"), weights.total("other")) == (
        4.0,
        1.0,
        2.0,
    )


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1.0, 2.0], "2 weights for 3 models"),
        ([1.0, math.nan, 1.0], "not finite"),
        ([1.0, math.inf, 1.0], "not finite"),
        ([0.0, 0.0, 0.0], "all are 0"),
        (Weights((1.0,) * 3, (("head.*", (1.0,)),)), r"head\.\*: 1 weights for 3 models"),
        (Weights((0.0,) * 3, (("head.*", (0.0,) * 3),)), "all are 0"),
    ],
)
def test_weights_are_checked(weights, message):
    with pytest.raises(DeltaflError, match=message):
        as_weights(weights, 3)


def test_the_report_holds_what_the_rule_found():
    world = make(4, seed=6)
    assert Aggregate(MEAN, world.updates, [1, 1, 2, 4]).report["coefficients"] == [
        0.125,
        0.125,
        0.25,
        0.5,
    ]
    kept = Aggregate(Ties(0.5), world.updates).report["kept_fraction"]
    # 35 + 33 + 1 elements, and round(69 / 2) = 34 (to even) of them are kept.
    assert kept == {f"model{i}": 34 / 69 for i in range(4)}


def test_a_float64_base_keeps_its_precision() -> None:
    base = {"w": torch.tensor([0.1, 1 / 3], dtype=torch.float64)}
    update = Update({"w": torch.tensor([1.0, 2.0])}, Source("m"))
    stepped = dict(step(base, [update], TaskArithmetic(), server_lr=0.0))
    assert torch.equal(stepped["w"], base["w"])


def test_a_result_that_overflows_float16_is_refused() -> None:
    update = Update({"w": torch.tensor([1e5])}, Source("m"))
    with pytest.raises(DeltaflError, match="do not fit into float16"):
        dict(step({"w": torch.tensor([1.0], dtype=torch.float16)}, [update], TaskArithmetic()))


def test_a_base_of_zeros_makes_a_rule_of_whole_weights():
    """Weights that sum to 1 interpolate whole models: the same model as by deltas, up to rounding."""
    world, weights = make(3, seed=7), (0.5, 0.3, 0.2)
    base = base_of(world)
    models = [{n: base[n] + d[n] for n in base} for d in world.deltas]
    whole = Aggregate(MEAN, updates(*models), weights)
    interpolated = dict(Stepped(Zeros(base), whole, 1.0))
    moved = dict(step(base, world.updates, MEAN, weights=weights))
    for name in base:
        torch.testing.assert_close(interpolated[name], moved[name], rtol=1e-6, atol=1e-6)
