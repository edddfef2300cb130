"""The laws, as functions of a rule and a world: an AssertionError is a broken promise."""

from dataclasses import replace

import pytest
import torch

from deltafl.algebra.aggregate import Aggregate, aggregate
from deltafl.algebra.deltas import Update
from deltafl.errors import DeltaflError
from deltafl.rules.rule import CoordinateRule, Rule, TensorRule
from laws.worlds import (
    LARGE,
    ByBlocks,
    World,
    assert_close,
    assert_same,
    flatten,
    make,
    of_weights,
    refusal,
    result,
    source,
    unflatten,
)


def fixed_point(rule: Rule, world: World) -> None:
    """Identical deltas come back as they are."""
    if rule.traits.fixed_point:
        same = replace(world, deltas=world.deltas[:1] * len(world.deltas))
        assert_close(result(rule, same), same.deltas[0], same)


def odd(rule: Rule, world: World) -> None:
    """R(-d) = -R(d)."""
    if rule.traits.odd:
        negated = {name: -t for name, t in result(rule, world).items()}
        assert_close(result(rule, world.mapped(torch.neg)), negated, world)


def coordinate_symmetric(rule: Rule, world: World) -> None:
    """Permuting coordinates commutes; inside each tensor only, where each has a threshold of its own."""
    if not rule.traits.coordinate_symmetric:
        return
    draw = torch.Generator().manual_seed(1)
    if isinstance(rule.core, TensorRule) or any(t.per_tensor or t.whole for t in rule.transforms):
        sizes = [t.numel() for t in world.deltas[0].values()]
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        parts = [s + torch.randperm(n, generator=draw) for s, n in zip(starts, sizes, strict=True)]
        order = torch.cat(parts)
    else:
        order = torch.randperm(len(flatten(world.deltas[0])), generator=draw)
    plain = result(rule, world)
    moved_after = unflatten(flatten(plain)[order], plain)
    moved_before = result(rule, world.with_flat(lambda flat: flat[order]))
    if isinstance(rule.core, CoordinateRule):
        assert_same(moved_before, moved_after)
    else:
        assert_close(moved_before, moved_after, world)


def order_free(rule: Rule, world: World) -> None:
    """The order of the models, with their sources and weights, matters only by rounding."""
    if rule.traits.order_free:
        for order in (range(len(world.deltas))[::-1], [*range(1, len(world.deltas)), 0]):
            assert_close(result(rule, world.reordered(order)), result(rule, world), world)


def streams(rule: Rule, world: World) -> None:
    """Read block by block or held in memory, by any number of threads: the same bits."""
    expected = result(rule, world)
    updates = [Update(ByBlocks(u.delta), u.source) for u in world.updates]
    by_blocks = Aggregate(rule, updates, world.weights, base=ByBlocks(world.base))
    assert_same(dict(by_blocks), expected)
    assert_same(result(rule, world, threads=3), expected)
    assert_same(dict(aggregate(rule, world.updates, world.weights, world.base)), expected)


def pure(rule: Rule, world: World) -> None:
    """No argument is modified."""
    before = world.with_flat(torch.clone)
    result(rule, world)
    updates = [Update(ByBlocks(u.delta), u.source) for u in world.updates]
    dict(Aggregate(rule, updates, world.weights, base=world.base))
    assert_same(world.base, before.base)
    for now, then in zip(world.deltas, before.deltas, strict=True):
        assert_same(now, then)


def float32_in_the_same_shapes(rule: Rule, world: World) -> None:
    """Float32, and the shapes of the deltas."""
    update = result(rule, world)
    assert {k: (v.shape, v.dtype) for k, v in update.items()} == {
        k: (v.shape, torch.float32) for k, v in world.deltas[0].items()
    }
    assert all(t.isfinite().all() for t in update.values())


def float64_agrees(rule: Rule, world: World) -> None:
    """In float64 the same values to float32's precision."""
    exact = result(rule, world, dtype=torch.float64)
    assert {t.dtype for t in exact.values()} == {torch.float64}
    assert_close({k: v.float() for k, v in exact.items()}, result(rule, world), world)


def equal_weights_are_none(rule: Rule, world: World) -> None:
    """Equal weights are no weights."""
    n = len(world.deltas)
    world = replace(world, weights=None)
    assert_same(result(rule, world, (2.0,) * n), result(rule, world))
    assert_close(result(rule, world, (0.3,) * n), result(rule, world), world)


def weights_are_relative(rule: Rule, world: World) -> None:
    """Weights times a constant are the same weights."""
    weights = world.weights or (1.0,) * len(world.deltas)
    expected = result(rule, world)
    assert_same(result(rule, world, [4 * w for w in weights]), expected)
    assert_close(result(rule, world, [w / 3 for w in weights]), expected, world)


def weight_0_leaves_out(rule: Rule, world: World) -> None:
    """A weight of 0 is the model left out."""
    n = len(world.deltas)
    weights = world.weights or (1.0,) * n
    if rule.core.num_models == n:
        return  # refused
    extra = make(1, seed=7).mapped(lambda t: t * 10 * flatten(world.deltas[0]).abs().max())
    more = replace(
        world,
        deltas=(*world.deltas, *extra.deltas),
        sources=(*world.sources, source(n)),
        weights=(*weights, 0.0),
    )
    assert_close(result(rule, more), result(rule, world), world)


def negative_weight_negates(rule: Rule, world: World) -> None:
    """A negative weight is the positive one with the delta negated; of whole weights it is an error."""
    weights = world.weights or (1.0,) * len(world.deltas)
    negated = tuple(
        {k: -v for k, v in d.items()} if i == 0 else d for i, d in enumerate(world.deltas)
    )
    flipped = [-w if i == 0 else w for i, w in enumerate(weights)]
    if of_weights(rule):
        with pytest.raises(DeltaflError, match="must not be negative"):
            result(rule, world, flipped)
        return
    assert_same(result(rule, world, flipped), result(rule, replace(world, deltas=negated), weights))


def half_precision_is_widened_first(rule: Rule, world: World) -> None:
    """16-bit deltas give what their float32 copies give; squares of 3e4 overflow float16, norms must not."""
    for dtype, scale in ((torch.float16, 1e4), (torch.bfloat16, 1e4)):
        largest = max(float(flatten(d).abs().max()) for d in world.deltas)
        narrow = world.mapped(lambda t, d=dtype, s=scale / largest: (t * s).to(d))
        update = result(rule, narrow)
        assert all(t.isfinite().all() for t in update.values())
        assert_same(update, result(rule, narrow.mapped(torch.Tensor.float)))


def zero_deltas(rule: Rule, world: World) -> None:
    """Zero deltas give a zero update; one among others does no harm."""
    rounding = 1e-14 * float(flatten(world.base).abs().max()) if of_weights(rule) else 0.0
    assert (flatten(result(rule, world.mapped(torch.zeros_like))).abs() <= rounding).all()
    one = ({k: torch.zeros_like(v) for k, v in world.deltas[0].items()}, *world.deltas[1:])
    assert flatten(result(rule, replace(world, deltas=one))).isfinite().all()


def one_model(rule: Rule, world: World) -> None:
    """One model: an error that says how many are needed, or a defined update; a fixed point where that is declared."""
    alone = replace(world.reordered([0]), weights=None)
    refused = refusal(rule, alone.sources)
    if refused is not None:
        assert "1 models" in refused
        return
    update = result(rule, alone)
    assert flatten(update).isfinite().all()
    if rule.traits.fixed_point:
        assert_close(update, alone.deltas[0], alone)


def refuses_nonfinite(rule: Rule, world: World) -> None:
    """NaN or Inf anywhere is an error that names model and tensor."""
    for value in (float("nan"), float("inf"), -float("inf")):
        for model in {0, len(world.deltas) - 1}:
            for name, t in world.deltas[0].items():
                for at in sorted({0, t.numel() // 2, t.numel() - 1}) if t.numel() else ():
                    bad = world.mapped(torch.clone)
                    bad.deltas[model][name].view(-1)[at] = value
                    with pytest.raises(DeltaflError) as error:
                        result(rule, bad)
                    assert f'"{world.sources[model].name}"' in str(error.value)
                    assert f'"{name}"' in str(error.value)


LAWS = (
    fixed_point,
    odd,
    coordinate_symmetric,
    order_free,
    pure,
    float32_in_the_same_shapes,
    float64_agrees,
    equal_weights_are_none,
    weights_are_relative,
    weight_0_leaves_out,
    negative_weight_negates,
    half_precision_is_widened_first,
    zero_deltas,
    one_model,
)
"""Tried on many small worlds; `streams` and `refuses_nonfinite`, which cost more, on worlds of their own."""


def large_world() -> World:
    """Tensors of several blocks."""
    return make(4, seed=0, kind="bfloat16", scale=1e-3, shapes=LARGE)
