import dataclasses
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

import pytest

from deltafl.errors import DeltaflError
from deltafl.registry import Registry
from deltafl.rules.cclip import CClip
from deltafl.rules.dare import Dare
from deltafl.rules.rule import (
    RULES,
    CoordinateRule,
    LinearRule,
    TensorRule,
    Within,
    build_rule,
    load_rules,
    parameters,
)
from deltafl.rules.task_arithmetic import TaskArithmetic
from deltafl.rules.ties import Ties
from laws.worlds import examples

METHODS = [
    "cclip",
    "consensus",
    "dare",
    "fedavg",
    "fedgma",
    "fednova",
    "geometric_median",
    "iso_c",
    "iso_cts",
    "knots",
    "krum",
    "median",
    "multi_krum",
    "task_arithmetic",
    "ties",
    "trimmed_mean",
    "tsv_m",
    "wudi",
]


def test_every_method_is_registered():
    assert set(METHODS) <= set(load_rules())


KINDS = (LinearRule, CoordinateRule, TensorRule)


@pytest.mark.parametrize("name", METHODS)
def test_a_rule_is_frozen_and_of_one_kind(name):
    for rule in examples(name):
        assert sum(isinstance(rule.core, kind) for kind in KINDS) == 1
        field = next(iter(dataclasses.fields(rule)), None)
        if field:
            with pytest.raises(dataclasses.FrozenInstanceError):
                setattr(rule, field.name, None)


def test_rules_are_known_without_torch():
    """The command line lists methods and their parameters before the heavy imports."""
    code = """
import sys
from deltafl.rules.rule import load_rules, parameters
assert all(parameters(load_rules()[n]) is not None for n in load_rules())
assert "torch" not in sys.modules, "torch was imported"
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_parameters_have_types_and_defaults():
    assert parameters(CClip)["rho"] == (float, dataclasses.MISSING)
    assert parameters(CClip)["iterations"] == (int, 1)
    assert parameters(Dare)["inner"][1] == TaskArithmetic()


def test_build_rule_with_and_without_defaults():
    assert build_rule("task_arithmetic", {}) == TaskArithmetic()
    assert build_rule("cclip", {"rho": 2.0, "iterations": 3}) == CClip(2.0, iterations=3)
    assert build_rule("dare", {"drop_rate": 0.5}) == Dare(0.5)


def test_a_wrapper_hands_on_what_is_not_its_own():
    built = build_rule("dare", {"drop_rate": 0.5, "inner": "ties", "density": 0.3, "seed": 4})
    assert built == Dare(0.5, Ties(0.3), seed=4)


@pytest.mark.parametrize(
    ("name", "params", "problems"),
    [
        ("fedgna", {}, ['unknown method "fedgna"; did you mean "fedgma"?']),
        ("xyz", {}, ["known: cclip, consensus, dare"]),
        ("fedgma", {}, ["fedgma needs --rho"]),
        ("dare", {}, ["dare needs --drop-rate"]),
        (
            "cclip",
            {"rho": 1.0, "iteration": 3},
            ['no parameter "iteration"; did you mean "iterations"?'],
        ),
        ("median", {"rho": 1.0}, ['median has no parameter "rho"; known: middle']),
        ("cclip", {"foo": 1, "bar": 2}, ['"foo"', '"bar"', "needs --rho"]),
        (
            "dare",
            {"inner": "ties", "densty": 0.3},
            ['ties has no parameter "densty"; did you mean "density"?', "dare needs --drop-rate"],
        ),
        (
            "dare",
            {"drop_rate": 0.5, "inner": "tise"},
            ['unknown method "tise"; did you mean "ties"?'],
        ),
    ],
)
def test_build_rule_reports_every_mistake_at_once(name, params, problems):
    with pytest.raises(DeltaflError) as error:
        build_rule(name, params)
    assert len(error.value.problems) == len(problems)
    for part, line in zip(problems, error.value.problems, strict=True):
        assert part in line


def test_a_name_is_registered_once():
    registry: Registry[int] = Registry("thing")
    assert registry.register("one")(1) == 1
    with pytest.raises(ValueError, match='thing "one" is registered twice'):
        registry.register("one")(2)
    assert list(registry) == ["one"]
    assert "one" in registry
    assert "two" not in registry
    with pytest.raises(ValueError, match="registered twice"):
        RULES.register("ties")(Ties)


@dataclasses.dataclass(frozen=True)
class Ranged(TaskArithmetic):
    """A rule that is not registered, with a parameter of each kind."""

    share: Annotated[float | Mapping[str, Sequence[float]], Within(0, 1)] = 0.5
    count: Annotated[int, Within(1)] = 1
    kind: Literal["a", "b", "c"] = "a"


@pytest.mark.parametrize(
    ("params", "problem"),
    [
        ({"share": 1.5}, "Ranged: share is 1.5; it must be in [0, 1]"),
        ({"share": float("nan")}, "Ranged: share is nan; it must be in [0, 1]"),
        ({"share": {"*": [0.5, -1]}}, "Ranged: share is -1; it must be in [0, 1]"),
        (
            {"share": {"x": [0.5]}},
            'Ranged: share by tensor needs "*" as its last pattern, for all the others',
        ),
        ({"count": 0}, "Ranged: count is 0; it must be 1 or more"),
        ({"kind": "d"}, 'Ranged: kind is "d"; it must be a, b or c'),
    ],
)
def test_parameters_are_held_to_their_types(params, problem):
    Ranged(0, 5, "c")
    Ranged({"x.*": [0, 1], "*": [1, 1]})
    with pytest.raises(DeltaflError) as error:
        Ranged(**params)
    assert str(error.value) == problem


def test_a_comparison_takes_typical_parameters_and_a_search_a_grid():
    assert CClip.typical() == {"unit": "quantile", "rho": 0.5}
    assert CClip.grid({"unit": "quantile"}, (1.0, 2.0)) == {}
    rhos = CClip.grid({}, (1.0, 2.0, 3.0))["rho"]
    assert (rhos[0], len(rhos)) == (1.0, 10)
    assert 3.0 < rhos[-1] < 3.0 + 1e-11
    assert (TaskArithmetic.typical(), TaskArithmetic.grid({}, (1.0,))) == ({}, {})


def test_a_rule_that_draws_takes_the_seed_of_the_run_if_it_is_given_none():
    assert Dare.seeded({"drop_rate": 0.5}, 3) == {"drop_rate": 0.5, "seed": 3}
    assert Dare.seeded({"seed": 1}, 3) == {"seed": 1}
    assert CClip.seeded({"rho": 1.0}, 3) == {"rho": 1.0}
