"""What all rules share: their kinds, their parameters, and a line for everything that cannot work."""

import dataclasses

import pytest

from deltafl.errors import DeltaflError
from deltafl.registry import Registry
from deltafl.rules.building import build_rule
from deltafl.rules.cclip import CClip
from deltafl.rules.dare import Dare
from deltafl.rules.krum import Krum
from deltafl.rules.rule import CoordinateRule, LinearRule, Source, TensorRule, check_rule
from deltafl.rules.task_arithmetic import TaskArithmetic
from deltafl.rules.ties import Ties
from deltafl.rules.trimmed_mean import TrimmedMean
from laws.worlds import rules
from rules.reference import apply, rows

NAN = float("nan")


@pytest.mark.parametrize("rule", rules(), ids=repr)
def test_a_rule_is_frozen_and_of_one_kind(rule):
    kinds = (LinearRule, CoordinateRule, TensorRule)
    assert sum(isinstance(rule.core, kind) for kind in kinds) == 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        rule.anything = 1


def test_rules_are_built_by_name_and_a_wrapper_hands_on_what_is_not_its_own():
    assert build_rule("task_arithmetic", {}) == TaskArithmetic()
    assert build_rule("cclip", {"rho": 2.0, "iterations": 3}) == CClip(2.0, iterations=3)
    assert build_rule("dare", {"drop_rate": 0.5}) == Dare(0.5)
    built = build_rule("dare", {"drop_rate": 0.5, "inner": "ties", "density": 0.3, "seed": 4})
    assert built == Dare(0.5, Ties(0.3), seed=4)


def test_a_model_of_weight_0_does_not_count():
    for rule, told in ((Krum(1), "with num_byzantine 1"), (TrimmedMean(2), "trim 2 leaves")):
        with pytest.raises(DeltaflError, match="4 models of weight above 0") as error:
            apply(rule, rows(5), [1.0] * 4 + [0.0])
        assert told in str(error.value)


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


def test_a_name_is_registered_once():
    registry: Registry[int] = Registry("thing")
    assert registry.register("one")(1) == 1
    with pytest.raises(ValueError, match='thing "one" is registered twice'):
        registry.register("one")(2)
    assert list(registry) == ["one"]


THREE: list[dict] = [{}, {}, {}]


ONE: list[dict] = [{}]


@pytest.mark.parametrize(
    ("name", "params", "sources", "lines"),
    [
        ("fedgna", {}, THREE, ['unknown method "fedgna"; did you mean "fedgma"?']),
        ("xyz", {}, THREE, ["known: arcee_fusion, breadcrumbs, cclip"]),
        ("fedgma", {}, THREE, ["fedgma needs --rho"]),
        ("dare", {}, THREE, ["dare needs --drop-rate"]),
        ("cclip", {"rho": 1, "iteration": 3}, THREE, ['"iteration"; did you mean "iterations"?']),
        ("median", {"rho": 1.0}, THREE, ['median has no parameter "rho"; known: middle']),
        ("cclip", {"foo": 1, "bar": 2}, THREE, ['"foo"', '"bar"', "needs --rho"]),
        ("dare", {"inner": "ties", "densty": 0.3}, THREE,
         ['ties has no parameter "densty"; did you mean "density"?', "dare needs --drop-rate"]),
        ("dare", {"drop_rate": 0.5, "inner": "tise"}, THREE, ['unknown method "tise"; did you mean']),
        ("cclip", {"rho": -1.0}, THREE, ["cclip: rho is -1; it must be 0 or more"]),
        ("cclip", {"rho": NAN}, THREE, ["cclip: rho is nan"]),
        ("cclip", {"rho": 1.0, "unit": "relative"}, THREE, ['unit is "relative"; it must be absolute or']),
        ("cclip", {"rho": 1.0, "iterations": 0}, THREE, ["cclip: iterations is 0; it must be 1 or more"]),
        ("cclip", {"rho": 1.5, "unit": "quantile"}, THREE, ["rho is 1.5; as a quantile it is at most 1"]),
        ("dare", {"drop_rate": 1.0}, THREE, ["dare: drop_rate is 1; it must be in [0, 0.99"]),
        ("dare", {"drop_rate": NAN}, THREE, ["dare: drop_rate is nan"]),
        ("dare", {"drop_rate": {"a": [0], "*": [0] * 3}}, THREE, ['drop_rate of "a": 1 numbers for 3']),
        ("fedgma", {"rho": 1.5}, THREE, ["fedgma: rho is 1.5; it must be in [0, 1]"]),
        ("fednova", {"normalizer": "adam"}, THREE, ["it must be sgd, momentum or prox"]),
        ("geometric_median", {"iterations": 0}, THREE, ["geometric_median: iterations is 0"]),
        ("geometric_median", {"smoothing": 0.0}, THREE, ["geometric_median: smoothing is 0"]),
        ("krum", {"num_byzantine": 1}, THREE, ["3 models of weight above 0 with num_byzantine 1; it needs"]),
        ("multi_krum", {"num_byzantine": 1}, THREE, ["needs at least 2f + 3 = 5 models"]),
        ("multi_krum", {"num_selected": 0}, THREE, ["num_selected is 0; it must be in 1 to 3"]),
        ("multi_krum", {"num_selected": 4}, THREE, ["num_selected is 4; it must be in 1 to 3"]),
        ("median", {"middle": "upper"}, THREE, ["it must be midpoint or lower"]),
        ("ties", {"density": 1.1}, THREE, ["ties: density is 1.1; it must be in [0, 1]"]),
        ("ties", {"density": {"*": [1, 2, 1]}}, THREE, ["ties: density is 2"]),
        ("ties", {"density": {"*": [1, 1]}}, THREE, ['ties: density of "*": 2 numbers for 3 models']),
        ("ties", {"density": {"a": [1] * 3}, "per_tensor": True}, THREE, ['needs "*" as its last pattern']),
        ("ties", {"density": {"a": [1] * 3, "*": [1] * 3}}, THREE, ["density by tensor needs per_tensor"]),
        ("ties", {"merge": "max"}, THREE, ["it must be mean or sum"]),
        ("ties", {"zero_sum": "negative"}, THREE, ["it must be none or positive"]),
        ("trimmed_mean", {"trim": -1}, THREE, ["trimmed_mean: trim is -1; it must be 0 or more"]),
        ("trimmed_mean", {"trim": 2}, THREE, ["trim 2 leaves nothing of 3 models of weight above 0; lower"]),
        ("wudi", {"ridge": -1.0}, THREE, ["wudi: ridge is -1; it must be 0 or more"]),
        ("wudi", {"prior": "none"}, THREE, ["it must be mean or sum"]),
        ("iso_c", {"power": 1.5}, THREE, ["iso_c: power is 1.5; it must be in [0, 1]"]),
        ("iso_cts", {"common_fraction": -0.1}, THREE, ["common_fraction is -0.1; it must be in [0, 1]"]),
        ("consensus", {"mask_threshold": -1.0}, THREE, ["mask_threshold is -1; it must be 0 or more"]),
        ("consensus", {"min_models": -1}, THREE, ["min_models is -1; it must be 0 or more"]),
        ("knots", {"inner": "cclip", "rho": 1.0}, THREE, ["knots: inner is cclip; it must treat each"]),
        ("knots", {"inner": "dare", "drop_rate": 0.5}, THREE, ["knots: inner is dare; it must treat"]),
        ("knots", {"inner": "median", "middle": "lower"}, THREE, ["knots: inner is median; it must"]),
        ("knots", {"inner": "ties", "density": {"*": [1] * 3}}, THREE, ["knots: inner is ties; it must"]),
        ("knots", {"inner": "trimmed_mean", "trim": 2}, THREE, ["trim 2 leaves nothing of 3 models"]),
        ("breadcrumbs", {}, THREE, ["breadcrumbs needs --density"]),
        ("breadcrumbs", {"density": 1.5}, THREE, ["breadcrumbs: density is 1.5; it must be in [0, 1]"]),
        ("breadcrumbs", {"density": 0.5, "gamma": {"*": [0]}}, THREE, ['gamma of "*": 1 numbers for 3']),
        ("breadcrumbs", {"density": 0.5, "inner": "krum", "num_byzantine": 1}, THREE, ["krum: 3 models"]),
        ("della", {"density": 0.1}, THREE, ["della: density 0.1 with epsilon 0.15: epsilon must be less than"]),
        ("della", {"density": {"*": [0.5, 0.9, 1]}}, THREE, ["density 0.9 with epsilon 0.15: epsilon must"]),
        ("della", {"density": 0.5, "rescale": "l2"}, THREE, ["it must be probability, l1 or none"]),
        ("dare", {"drop_rate": 0.5, "rescale": "l2"}, THREE, ["it must be probability, l1 or none"]),
        ("slerp", {"t": 0.5}, THREE, ["slerp: 3 models; it merges 1 into the base, no more and no less"]),
        ("slerp", {}, ONE, ["method slerp needs --t"]),
        ("slerp", {"t": {"*": [1, 1]}}, ONE, ['slerp: t of "*": 2 numbers for 1 models']),
        ("slerp", {"t": NAN}, ONE, ["slerp: t is nan; it must be in [-1000, 1000]"]),
        ("nuslerp", {}, THREE, ["nuslerp: 3 models; it merges 2 into the base"]),
        ("nuslerp", {"space": "delta"}, THREE, ['space is "delta"; it must be deltas or weights']),
        ("nuslerp", {"per": "layer"}, THREE, ['per is "layer"; it must be tensor, row or column']),
        ("nearswap", {"t": -1.0}, ONE, ["nearswap: t is -1; it must be 0 or more"]),
        ("arcee_fusion", {}, THREE, ["arcee_fusion: 3 models; it merges 1 into the base"]),
        ("karcher", {"iterations": 0}, THREE, ["karcher: iterations is 0; it must be 1 or more"]),
        ("sce", {"select_topk": 1.5}, THREE, ["sce: select_topk is 1.5; it must be in [0, 1]"]),
        ("ram", {"epsilon": -1.0}, THREE, ["ram: epsilon is -1; it must be 0 or more"]),
        ("fedavg", {}, ONE, ['fedavg: model "m0": number of examples is None; give it with --num-examples']),
        ("fedavg", {}, [{"num_examples": 0}], ["number of examples is 0"]),
        ("fednova", {}, [{"num_steps": -1}], ['model "m0": number of local steps is -1; give it with --num-steps']),
        ("fednova", {"normalizer": "momentum"}, ONE, ["local steps is None", "momentum is None"]),
        ("fednova", {"normalizer": "momentum"}, [{"num_steps": 1, "momentum": 1.0}], ["[0, 1)"]),
        ("fednova", {"normalizer": "prox"}, [{"num_steps": 1, "lr": 0.1}], ["prox_mu is None"]),
        ("fednova", {"normalizer": "prox"}, [{"num_steps": 1, "lr": 1.0, "prox_mu": 1.0}],
         ["lr is 1.0, prox_mu is 1.0; their product must be in (0, 1), in training.json"]),
    ],
)  # fmt: skip
def test_everything_that_cannot_work_is_one_line(name, params, sources, lines):
    models = [Source(f"m{i}", **known) for i, known in enumerate(sources)]
    with pytest.raises(DeltaflError) as error:
        check_rule(build_rule(name, params), models)
    for part, line in zip(lines, error.value.problems, strict=True):
        assert part in line
