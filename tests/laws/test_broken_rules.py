"""The laws find a broken rule, and they find it because it is registered."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from deltafl.algebra.deltas import Deltas
from deltafl.algebra.tensors import lazy
from deltafl.errors import DeltaflError
from deltafl.rules.rule import CoordinateRule, LinearRule, Stats, Threshold, Transform
from laws import laws
from laws.worlds import make, registered, rules


@dataclass(frozen=True)
class Coordinate(CoordinateRule):
    """A coordinate rule that promises everything."""

    function: Callable[[Tensor, Sequence[float]], Tensor]

    def combine(self, block: Tensor, weights: Sequence[float]) -> Tensor:
        return self.function(block, weights)


@dataclass(frozen=True)
class Forgiving(Transform):
    """A transform that hides NaN and Inf."""

    def apply(
        self, block: Tensor, model: int, name: str, start: int, threshold: Threshold
    ) -> Tensor:
        return block.nan_to_num_(0.0, 0.0, 0.0)


@dataclass(frozen=True)
class Hiding(Coordinate):
    transforms = (Forgiving(),)


@dataclass(frozen=True)
class Unweighted(LinearRule):
    """Linear, and forgets the weights; the other kinds do not see a model of weight 0."""

    def coefficients(self, stats: Stats, weights: Tensor) -> Tensor:
        return torch.full_like(weights, 1 / len(weights))


def mean(block: Tensor, weights: Sequence[float]) -> Tensor:
    return (block * block.new_tensor(weights)[:, None]).sum(0)


BROKEN = {
    laws.fixed_point: Coordinate(lambda b, w: 2 * mean(b, w)),
    laws.odd: Coordinate(lambda b, w: b.amax(0)),
    laws.coordinate_symmetric: Coordinate(lambda b, w: mean(b, w).cumsum(0)),
    laws.order_free: Coordinate(lambda b, w: b[0].clone()),
    laws.float32_in_the_same_shapes: Coordinate(lambda b, w: mean(b.double(), w)),
    laws.float64_agrees: Coordinate(
        lambda b, w: (
            mean(b.bfloat16().float(), w).double() if b.dtype == torch.float64 else mean(b, w)
        )
    ),
    laws.weight_0_leaves_out: Unweighted(),
    laws.zero_deltas: Coordinate(lambda b, w: mean(b, w) / mean(b, w).abs()),
    laws.one_model: Coordinate(lambda b, w: mean(b, w) / (len(w) - 1)),
    laws.half_precision_is_widened_first: Coordinate(
        lambda b, w: mean(b.half().square(), w).float()
    ),
    laws.refuses_nonfinite: Hiding(mean),
}


@pytest.mark.parametrize("law", BROKEN, ids=lambda law: law.__name__)
def test_a_broken_rule_fails_its_law(law):
    world = make(4, seed=0, scale=0.01)
    law(Coordinate(mean), world)
    with pytest.raises((AssertionError, pytest.fail.Exception, DeltaflError)):
        law(BROKEN[law], world)


def test_a_rule_is_held_to_the_laws_by_being_registered():
    with registered("unweighted", Unweighted):
        assert Unweighted() in rules()
    assert Unweighted() not in rules()


def test_purity_is_checked_on_what_the_engine_hands_out(monkeypatch):
    rule = Coordinate(lambda b, w: mean(b, w))

    def own(self, name, start, stop, models=None):
        return torch.stack([lazy(u.delta).block(name, start, stop).add_(1) for u in self.updates])

    monkeypatch.setattr(Deltas, "stack", own)
    with pytest.raises(AssertionError):
        laws.pure(rule, make(3, seed=0))
