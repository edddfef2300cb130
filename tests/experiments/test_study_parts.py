"""The parts that studies are made of: draws, subsets, groups of classes, intervals, what a rule is worth."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deltafl.errors import DeltaflError
from deltafl.experiments.arithmetic import random_like
from deltafl.experiments.heterogeneity import KINDS, draws, mean_cosine, subsets
from deltafl.experiments.recipe import StudyRecipe, suite_names
from deltafl.experiments.run import STUDIES
from deltafl.experiments.statistics import by_seed, correlation, interval, summary
from deltafl.experiments.study import SINGLE, UNMERGED, Study, rows_of
from deltafl.merge.task_vector import TaskVector
from deltafl.tasks.classes import class_groups
from deltafl.training import TrainingRecipe

RECIPE = TrainingRecipe.of(model="base", data="", steps=0)


def study(**changes: object) -> Study:
    settings = {
        "base": "base", "tasks": ("a", "b", "c", "d"), "training": RECIPE, "seeds": (0,),
        "lrs": (1.0, 0.1, 0.01), "steps": (1, 2, 3, 4), "methods": (), "lambdas": (0.5,), "control": "d",
        "domains": (), "split": "d",
    }  # fmt: skip
    return Study(**(settings | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", [0, 1])
def test_draws_are_of_their_kind_all_different_and_a_function_of_the_seed(seed: int) -> None:
    for kind in KINDS:
        settings = study(draws=6)
        found = draws(settings, kind, seed)
        assert len(set(found)) == 6
        assert found == draws(settings, kind, seed)
        assert found != draws(settings, kind, seed + 1)
        for merge in found:
            assert [m.data.spec for m in merge.models] == ["a", "b", "c", "d"]
            differ = [len({getattr(m, key) for m in merge.models}) > 1 for key in ("lr", "steps")]
            assert differ == list(KINDS[kind])


def test_there_are_no_more_draws_than_different_merges() -> None:
    assert len(draws(study(lrs=(1.0, 0.1), steps=(1, 2), draws=50), "alike", 0)) == 4


def test_near_and_far_subsets_are_those_of_a_search_by_hand() -> None:
    vectors = np.random.default_rng(0).standard_normal((5, 4))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    found = subsets(torch.from_numpy(vectors @ vectors.T))
    assert [(name, len(subset)) for name, subset in found] == [
        ("near", 2), ("far", 2), ("near", 3), ("far", 3), ("near", 4), ("far", 4), ("all", 5),
    ]  # fmt: skip
    for name, subset in found[:-1]:
        # the mean cosine of all pairs grows with the length of the sum of the vectors
        lengths = {
            s: np.linalg.norm(vectors[list(s)].sum(0)) for s in itertools.combinations(range(5), len(subset))
        }  # fmt: skip
        assert subset == (max if name == "near" else min)(lengths, key=lambda s: lengths[s])
    pair = found[0][1]
    assert mean_cosine(torch.from_numpy(vectors @ vectors.T), pair) == pytest.approx(
        vectors[pair[0]] @ vectors[pair[1]]
    )


@given(classes=st.integers(1, 60), parts=st.integers(1, 60), seed=st.integers(0, 9))
@settings(max_examples=60, deadline=None)
def test_groups_of_classes_part_them_evenly(classes: int, parts: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    if parts > classes:
        with pytest.raises(
            DeltaflError, match=f"{classes} classes cannot be dealt into {parts} groups"
        ):
            class_groups(classes, parts, generator)
        return
    groups = class_groups(classes, parts, generator)
    assert sorted(torch.cat(groups).tolist()) == list(range(classes))
    sizes = [len(group) for group in groups]
    assert max(sizes) - min(sizes) <= 1


def test_the_interval_is_students() -> None:
    values = [0.3, 0.1, 0.4, 0.15, 0.9]
    low, high = interval(values) or (0, 0)
    half = (
        2.7764451 * np.std(values, ddof=1) / np.sqrt(5)
    )  # the 97.5 % point of t with 4 degrees of freedom
    assert (low, high) == pytest.approx((np.mean(values) - half, np.mean(values) + half), rel=1e-6)
    assert interval([1.0]) is None
    assert summary(values).spread == pytest.approx(np.std(values, ddof=1))
    assert summary([2.0]).spread is None


def test_the_correlation_is_pearsons_where_there_is_one() -> None:
    x, y = [1.0, 2.0, 4.0, 3.0], [0.1, 0.4, 0.2, 0.9]
    assert correlation(x, y) == pytest.approx(np.corrcoef(x, y)[0, 1])
    assert correlation([1.0, 1.0, 1.0], y[:3]) is None
    assert correlation(x[:2], y[:2]) is None


def test_means_are_over_the_points_of_each_seed() -> None:
    points = [{"seed": 0, "x": 1.0}, {"seed": 1, "x": 5.0}, {"seed": 0, "x": 3.0}]
    assert by_seed(points, "x") == [2.0, 5.0]


def test_a_rule_that_validation_puts_below_the_base_is_the_base() -> None:
    single = {"rule": SINGLE, "val": None, "mean": 1.0}
    base = {"rule": UNMERGED, "val": 0.5, "mean": 0.3}
    median = {"rule": "median", "val": 0.4, "mean": 0.9}
    ties = {"rule": "ties", "val": 0.5, "mean": 0.8}
    assert rows_of({"rows": [single, base, median, ties]}) == {
        SINGLE: single,
        UNMERGED: base,
        "median": {**base, "rule": "median"},
        "ties": ties,
    }


def test_a_random_vector_has_the_norm_of_every_tensor_and_another_direction() -> None:
    delta = TaskVector({"a": torch.randn(40, 30), "b": torch.zeros(3), "c": torch.randn(50) * 7})
    drawn = random_like(delta, torch.Generator().manual_seed(0))
    for name, tensor in delta.tensors.items():
        assert float(drawn.tensors[name].norm()) == pytest.approx(float(tensor.norm()), rel=1e-5)
    assert abs(delta.dot(drawn)) < 0.2 * delta.norm() ** 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": ("a", "a")}, "names a data set twice"),
        ({"lr_values": (1.0, -1.0)}, "lr_values.1: must be greater than 0"),
        ({"steps_values": (0,)}, "steps_values.0: must be greater than or equal to 1"),
        ({"methods": ("medain",)}, 'did you mean "median"?'),
        ({"val_limit": 0}, "val_limit: must be greater"),
        ({"draws": 0}, "draws: must be greater"),
        ({"jobs": 0}, "jobs: must be greater"),
        ({"scaling_coefs": (float("nan"),)}, "scaling_coefs.0: must be a finite number"),
        ({"scaling_coefs": ()}, "scaling_coefs: "),
        ({"steps_values": ()}, "steps_values: "),
    ],
)
def test_every_mistake_has_a_line(changes: dict[str, object], message: str) -> None:
    with pytest.raises(DeltaflError) as caught:
        StudyRecipe.of(**{"tasks": ("a", "b"), "domains": ("a", "b")} | changes)
    assert len(caught.value.problems) == 1
    assert message in caught.value.problems[0]


@pytest.mark.parametrize(
    ("settings", "name", "need"),
    [
        ({}, "scaling-coef", "at least two data sets"),
        ({"tasks": ("a",)}, "negation", "at least two data sets"),
        (
            {"tasks": ("a", "b"), "lr_values": (1.0, 1.0)},
            "training-heterogeneity",
            "at least two of",
        ),
        ({"tasks": ("a", "b")}, "analogy", "--domains"),
        ({"tasks": ("a", "b"), "domains": ("a", "b", "a")}, "analogy", "--domains"),
    ],
)
def test_a_study_says_what_it_needs(settings: dict[str, object], name: str, need: str) -> None:
    assert need in (StudyRecipe.of(**settings).lacking(name) or "")


def test_all_means_every_suite_and_a_name_is_taken_once() -> None:
    assert suite_names(["all", "x"], ("x", "y")) == ["x", "y"]
    assert suite_names(["y", "y"], ("x", "y")) == ["y"]
    whole = StudyRecipe.of(tasks=("a", "b"), domains=("a", "b"))
    assert not any(whole.lacking(name) for name in STUDIES)


def test_gains_always_have_what_they_refer_to() -> None:
    names = [name for name, _ in StudyRecipe.of(methods=("median",)).grids()]
    assert names == ["task_arithmetic", "median"]
