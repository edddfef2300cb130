"""The parts that studies are made of: draws, subsets, groups of classes, intervals, what a rule is worth."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deltafl.errors import DeltaflError
from deltafl.experiments.studies.data_heterogeneity import mean_cosine, subsets
from deltafl.experiments.studies.merging import able, seeded, settled
from deltafl.experiments.studies.options import STUDY_NAMES, StudyOptions, names_of
from deltafl.experiments.studies.statistics import by_seed, correlation, interval, summary
from deltafl.experiments.studies.study import Study
from deltafl.experiments.studies.training_heterogeneity import KINDS, draws
from deltafl.experiments.studies.trials import random_like
from deltafl.merge.task_vector import TaskVector
from deltafl.rules.rule import Source
from deltafl.tasks.arrays import arrays_of, image_task, load_arrays
from deltafl.tasks.classes import class_groups, only_classes
from deltafl.training import TrainingRecipe

RECIPE = TrainingRecipe.of(model="base", data="", steps=0)


def study(**changes: object) -> Study:
    settings = {
        "base": "base", "folder": Path("work"), "tasks": ("a", "b", "c", "d"), "recipe": RECIPE,
        "lrs": (1.0, 0.1, 0.01), "steps": (1, 2, 3, 4), "methods": (), "lambdas": (0.5,), "control": "d",
        "domains": (), "split": "d",
    }  # fmt: skip
    return Study(**(settings | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", [0, 1])
def test_draws_are_of_their_kind_all_different_and_a_function_of_the_seed(seed: int) -> None:
    for kind in KINDS:
        found = draws(study(draws=6), kind, seed)
        assert len(set(found)) == 6
        assert found == draws(study(draws=6), kind, seed)
        assert found != draws(study(draws=6), kind, seed + 1)
        for merge in found:
            assert [m.data.spec for m in merge.models] == ["a", "b", "c", "d"]
            lrs, steps = (
                {getattr(m.training, key) for m in merge.models} for key in ("lr", "steps")
            )
            assert (len(lrs) > 1) == (kind in ("lr differs", "both differ"))
            assert (len(steps) > 1) == (kind in ("steps differ", "both differ"))


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


def test_a_part_of_a_task_has_the_examples_of_its_classes_and_the_head_of_the_whole() -> None:
    whole = load_arrays("digits", image_size=8, channels=1)
    part = arrays_of(only_classes(image_task(whole), torch.tensor([2, 7]), "part"))
    assert part.class_names == whole.class_names
    for name in ("train", "val", "test"):
        own, all_ = getattr(part, name), getattr(whole, name)
        keep = (all_.labels == 2) | (all_.labels == 7)
        assert torch.equal(own.labels, all_.labels[keep])
        assert torch.equal(own.images, all_.images[keep])
    with pytest.raises(DeltaflError, match='task "none" has no example in train, val, test'):
        only_classes(image_task(whole), torch.tensor([11]), "none")


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
    def row(name: str, val: float | None) -> dict[str, object]:
        return {"rule": name, "val": val, "mean": name}

    rows = [
        row("single-task models", None),
        row("base (unmerged)", 0.5),
        row("median", 0.4),
        row("ties", 0.5),
    ]
    assert settled({"rows": rows}) == {
        "median": row("median", 0.5) | {"mean": "base (unmerged)"},
        "ties": rows[3],
    }


def test_methods_that_the_models_cannot_be_merged_by_are_told() -> None:
    sources = [Source("a", num_steps=3), Source("b", num_steps=4)]
    good, left_out = able([("krum", {}), ("fednova", {}), ("fedgma", {"rho": [0.1, 7.0]})], sources)
    assert good == [("fednova", {})]
    assert "needs at least 2f + 3 = 3 models" in left_out["krum"]
    assert "rho" in left_out["fedgma"]


def test_a_random_vector_has_the_norm_of_every_tensor_and_another_direction() -> None:
    delta = TaskVector({"a": torch.randn(40, 30), "b": torch.zeros(3), "c": torch.randn(50) * 7})
    drawn = random_like(delta, torch.Generator().manual_seed(0))
    for name, tensor in delta.tensors.items():
        assert float(drawn.tensors[name].norm()) == pytest.approx(float(tensor.norm()), rel=1e-5)
    assert abs(delta.dot(drawn)) < 0.2 * delta.norm() ** 2


@pytest.mark.parametrize(
    ("changes", "names", "message"),
    [
        ({"tasks": ("a",)}, ["scaling-coef"], "at least two data sets"),
        ({"tasks": ("a", "a")}, ["scaling-coef"], "names a data set twice"),
        ({"lr_values": (1.0, -1.0)}, ["scaling-coef"], "--lr-values must be positive"),
        ({"steps_values": (0,)}, ["scaling-coef"], "--steps-values must be positive"),
        ({"lr_values": (1.0,)}, ["training-heterogeneity"], "at least two of --lr-values"),
        ({"domains": ("a", "a")}, ["analogy"], "analogy needs --domains"),
        ({"methods": ("medain",)}, ["scaling-coef"], 'did you mean "median"?'),
        ({"val_limit": 0}, ["scaling-coef"], "--val-limit must be 1 or more"),
        ({"draws": 0}, ["scaling-coef"], "--draws"),
        ({"jobs": 0}, ["scaling-coef"], "--jobs"),
        ({"scaling_coefs": (float("nan"),)}, ["scaling-coef"], "must be finite numbers"),
        ({"scaling_coefs": ()}, ["scaling-coef"], "--scaling-coefs names no value"),
        ({"steps_values": ()}, ["scaling-coef"], "--steps-values must be positive"),
        ({"lr_values": (1.0, 1.0)}, ["training-heterogeneity"], "at least two of --lr-values"),
        ({"domains": ("a", "b", "a")}, ["analogy"], "analogy needs --domains"),
    ],
)
def test_every_mistake_has_a_line(
    changes: dict[str, object], names: list[str], message: str
) -> None:
    fine = StudyOptions(tasks=("a", "b"), domains=("a", "b"))
    assert fine.problems(STUDY_NAMES) == []
    problems = StudyOptions(**({"tasks": ("a", "b"), "domains": ("a", "b")} | changes)).problems(
        names
    )  # type: ignore[arg-type]
    assert len(problems) == 1
    assert message in problems[0]


def test_all_means_every_suite_and_a_name_is_taken_once() -> None:
    assert names_of(["all", "x"], ("x", "y")) == ["x", "y"]
    assert names_of(["y", "y"], ("x", "y")) == ["y"]


def test_all_leaves_out_what_has_no_data_and_says_what_it_needs() -> None:
    assert set(StudyOptions().lacking()) == set(STUDY_NAMES)
    assert StudyOptions(tasks=("a", "b")).lacking() == {"analogy": "--domains"}
    assert StudyOptions(tasks=("a", "b"), domains=("a", "b")).lacking() == {}


def test_rules_that_draw_at_random_draw_anew_in_every_run() -> None:
    methods = [("dare", {"drop_rate": 0.5}), ("median", {})]
    assert seeded(methods, 3) == [("dare", {"seed": 3, "drop_rate": 0.5}), ("median", {})]


def test_gains_always_have_what_they_refer_to() -> None:
    assert [name for name, _ in StudyOptions(methods=("median",)).grids()] == [
        "task_arithmetic",
        "median",
    ]
