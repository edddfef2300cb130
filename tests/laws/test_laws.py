from dataclasses import replace

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from deltafl.rules.rule import TensorRule
from laws import laws
from laws.worlds import make, rules, worlds

EXACT_TIES_BY_ORDER = {laws.order_free, laws.float64_agrees, laws.coordinate_symmetric}
"""Laws under which a rule that chooses by distance, or in a basis of singular vectors, may decide a tie either way."""

WITHOUT_SHRINKING = settings(
    max_examples=4, derandomize=True, phases=(Phase.explicit, Phase.generate)
)
"""A world is a seed and a few choices: nothing to shrink, and trying would take minutes."""


ALL = rules()


def named(value: object) -> str:
    return getattr(value, "__name__", repr(value))


@pytest.mark.parametrize("rule", ALL, ids=named)
@pytest.mark.parametrize("law", laws.LAWS, ids=named)
@WITHOUT_SHRINKING
@given(data=st.data())
def test_every_rule_keeps_the_law(law, rule, data):
    by_distance = rule.core.needs_gram or isinstance(rule.core, TensorRule)
    exact = by_distance and law in EXACT_TIES_BY_ORDER
    exact |= bool(rule.transforms) and law is laws.coordinate_symmetric  # the first of equals
    kinds = ("normal",) if exact else ("normal", "grid", "bfloat16")
    law(rule, data.draw(worlds(kinds)).fitting(rule))


@pytest.mark.parametrize("rule", ALL, ids=named)
def test_blocks_memory_and_threads_give_the_same_bits(rule):
    world = replace(laws.large_world(), weights=(1.0, 2.0, 1.0, -0.5))
    laws.streams(rule, world.fitting(rule))


@pytest.mark.parametrize("rule", ALL, ids=named)
def test_nan_and_inf_are_refused(rule):
    for weights in (None, (1.0, 2.0, 2.0)):
        laws.refuses_nonfinite(rule, replace(make(3, seed=3), weights=weights).fitting(rule))
