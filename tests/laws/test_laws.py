import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from deltafl.aggregation import core_of
from deltafl.rules import LinearRule
from laws import laws
from laws.worlds import World, make, rules, worlds

EXACT_TIES_BY_ORDER = {laws.order_free, laws.float64_agrees, laws.coordinate_symmetric}
"""Laws under which a rule that chooses by distance may decide between two equal distances either way."""


def named(value: object) -> str:
    return getattr(value, "__name__", repr(value))


@pytest.mark.parametrize("rule", rules(), ids=named)
@pytest.mark.parametrize("law", laws.LAWS, ids=named)
@settings(max_examples=6, derandomize=True, phases=(Phase.explicit, Phase.generate))
@given(data=st.data())
def test_every_rule_keeps_the_law(law, rule, data):
    by_distance = isinstance(core_of(rule), LinearRule) and law in EXACT_TIES_BY_ORDER
    law(rule, data.draw(worlds(kinds=("normal",) if by_distance else ("normal", "grid", "bfloat16"))))


@pytest.mark.parametrize("rule", rules(), ids=named)
def test_blocks_memory_and_threads_give_the_same_bits(rule):
    world = laws.large_world()
    laws.streams(rule, world)
    laws.streams(rule, World(world.deltas, world.sources, (1.0, 2.0, 1.0, -0.5)))


@pytest.mark.parametrize("rule", rules(), ids=named)
def test_nan_and_inf_are_refused(rule):
    laws.refuses_nonfinite(rule, make(3, seed=3))
    laws.refuses_nonfinite(rule, World(make(3, seed=3).deltas, make(3, seed=3).sources, (1.0, 2.0, 2.0)))
