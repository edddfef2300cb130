"""The parts that studies are made of: draws, subsets, intervals, what a rule is worth."""

import itertools
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from deltafl.errors import DeltaflError
from deltafl.experiments import STUDIES, read_suite, suite_names
from deltafl.experiments.arithmetic import random_like
from deltafl.experiments.merges import KINDS, draws, subsets, told, training_rows
from deltafl.experiments.recipe import StudyRecipe
from deltafl.experiments.study import Data, Study, task_of
from deltafl.experiments.sweep import Cell, Store, mean_curves, tabulate
from deltafl.merge.task_vector import TaskVector
from deltafl.models import Net
from deltafl.tasks import ImageInput, Task
from deltafl.training import TrainingRecipe
from tiny_models import vit_file

TWO = {"tasks": ("a", "b")}


def study(seed: int = 0, **changes: object) -> Study:
    settings = {"lr_values": (1.0, 0.1, 0.01), "steps_values": (1, 2, 3, 4), **changes}
    training = TrainingRecipe.of(model="base", data="", steps=0, seed=seed)
    recipe = StudyRecipe.of(tasks=("a", "b", "c", "d"), **settings)
    return Study("base", ImageInput(8), recipe, training)


def test_fine_tunes_train_on_all_and_are_validated_on_what_judges_merges(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = list[tuple[int, int]]()

    def finetune(net: Net, task: Task, *_: object, **__: object) -> SimpleNamespace:
        seen.append((task.size("train"), task.size("val")))
        return SimpleNamespace(training={})

    monkeypatch.setattr("deltafl.experiments.study.finetune", finetune)
    whole, base = replace(study(val_limit=7), base=vit_file()), Data("digits:mirrored")
    whole.tuned(base, 0.1, 2).run(tmp_path, Store(tmp_path))
    assert seen == [(task_of(whole, base).size("train"), 7)]


@pytest.mark.parametrize("kind", KINDS)
def test_draws_are_of_their_kind_all_different_and_a_function_of_the_seed(kind: str) -> None:
    def trainings(seed: int) -> list[list[tuple]]:
        merges = draws(study(seed, draws=6), kind)
        return [[(m.data.spec, m.lr, m.steps) for m in merge.models] for merge in merges]

    found = trainings(0)
    assert len({tuple(merge) for merge in found}) == 6
    assert found == trainings(0) != trainings(1)
    for merge in found:
        specs, lrs, steps = zip(*merge, strict=True)
        assert specs == ("a", "b", "c", "d")
        assert (len({*lrs}) > 1, len({*steps}) > 1) == KINDS[kind]


def test_there_are_no_more_draws_than_different_merges() -> None:
    assert len(draws(study(lr_values=(1.0, 0.1), steps_values=(1, 2), draws=50), "alike")) == 4


def test_near_and_far_subsets_are_those_of_a_search_by_hand() -> None:
    vectors = np.random.default_rng(0).standard_normal((5, 4))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    found = subsets(vectors @ vectors.T)
    sizes = [(name, size) for size in (2, 3, 4) for name in ("near", "far")]
    assert [(name, len(subset)) for name, subset in found] == [*sizes, ("all", 5)]
    for name, subset in found[:-1]:
        # the mean cosine of all pairs grows with the length of the sum of the vectors
        lengths = {
            s: np.linalg.norm(vectors[list(s)].sum(0))
            for s in itertools.combinations(range(5), len(subset))
        }
        assert subset == (max if name == "near" else min)(lengths, key=lambda s: lengths[s])


def test_a_row_has_the_mean_the_spread_and_students_interval_of_its_group() -> None:
    gains = np.array([0.3, 0.1, 0.4, 0.15, 0.9])
    points = [{"rule": "a", "score": 2 * g, "coef": g, "gain": g} for g in gains]
    points += [{"rule": "b", "score": 1.0, "coef": 2.0, "gain": None}]
    a, b = tabulate(pd.DataFrame(points), ["rule"], "score", "coef")
    # the 97.5 % point of t with 4 degrees of freedom
    mean, spread, half = gains.mean(), gains.std(ddof=1), 2.7764451 * gains.std(ddof=1) / 5**0.5
    assert [a["mean"], a["spread"], a["runs"], a["coef"]] == pytest.approx(
        [2 * mean, 2 * spread, 5, mean]
    )
    assert [a["low"], a["gain"], a["high"]] == pytest.approx(
        [mean - half, mean, mean + half], rel=1e-6
    )
    assert (b["mean"], b["runs"], b["coef"]) == (1, 1, 2)
    assert all(np.isnan([b[key] for key in ("spread", "gain", "low", "high")]))


def test_relations_are_pearsons_r_where_there_is_one() -> None:
    steps, norms, gains = [1, 2, 8, 4], [3.0] * 4, [0.1, 0.4, 0.2, 0.9]
    points = [
        {
            "rule": rule,
            "normalized": 1,
            "accuracy": 1,
            "gain": gain,
            "steps_ratio": s,
            "norm_ratio": n,
        }
        for rule in ("median", "ties")
        for s, n, gain in zip(steps, norms, gains, strict=True)
    ]
    told = training_rows([(Cell({"kind": "alike"}, None), {"points": points[:-2]})])  # type: ignore
    median, ties = told["relations"]
    assert (median["points"], ties["points"]) == (4, 2)
    assert median["steps"] == pytest.approx(np.corrcoef(np.log(steps), gains)[0, 1])
    assert np.isnan([median["norm"], ties["steps"]]).all()


def test_a_mean_curve_goes_as_far_as_all_runs_go() -> None:
    curves = [("a", [(0, 1.0), (1, 2.0), (2, 9.0)]), ("b", [(5, 5.0)]), ("a", [(0, 3.0), (1, 5.0)])]
    assert mean_curves(curves) == {"a": [[0, 2.0], [1, 3.5]], "b": [[5, 5.0]]}


def test_a_rule_that_validation_puts_below_the_base_is_the_base() -> None:
    single = {"rule": "single-task models", "val": None, "mean": 1.0}
    base = {"rule": "base (unmerged)", "val": 0.5, "mean": 0.3}
    median = {"rule": "median", "val": 0.4, "mean": 0.9}
    ties = {"rule": "ties", "val": 0.5, "mean": 0.8}
    assert told([single, base, median, ties]) == [single, base, {**base, "rule": "median"}, ties]


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
        ({"methods": ("medain",)}, 'did you mean "median"?'),
        ({"val_limit": 0}, "val_limit: must be greater"),
        ({"scaling_coefs": (float("nan"),)}, "scaling_coefs.0: must be a finite number"),
        ({"steps_values": ()}, "steps_values: "),
    ],
)
def test_every_mistake_has_a_line(changes: dict[str, object], message: str) -> None:
    with pytest.raises(DeltaflError) as caught:
        StudyRecipe.of(**TWO | changes)
    (problem,) = caught.value.problems
    assert message in problem


@pytest.mark.parametrize(
    ("settings", "name", "need"),
    [
        ({}, "scaling-coef", "at least two data sets"),
        ({"tasks": ("a",)}, "negation", "at least two data sets"),
        (TWO | {"lr_values": (1.0, 1.0)}, "training-heterogeneity", "at least two of"),
        (TWO, "analogy", "--domains"),
        (TWO | {"domains": ("a", "b", "a")}, "analogy", "--domains"),
        *(
            (TWO | {"domains": ("a", "b"), "written": {"a": "exact"}}, name, None)
            for name in STUDIES
        ),
        (
            TWO,
            "language",
            "study.written in a file: on which data what a model writes is judged, and how",
        ),
    ],
)
def test_a_study_says_what_it_needs(
    settings: dict[str, object], name: str, need: str | None
) -> None:
    told = StudyRecipe.of(**settings).lacking(name)
    assert told is None if need is None else need in str(told)


def test_all_means_every_suite_and_a_name_is_taken_once() -> None:
    assert suite_names(["all", "x"], ("x", "y")) == ["x", "y"]
    assert suite_names(["y", "y"], ("x", "y")) == ["y"]


def test_gains_always_have_what_they_refer_to() -> None:
    assert StudyRecipe.of(methods=("median",)).compared == ("task_arithmetic", "median")


def test_fine_tunes_have_the_given_settings_that_fine_tunes_have_too() -> None:
    given = {"lr": 0.5, "weight_decay": 0.25, "num_rounds": 3}
    recipe, training = read_suite(None, given)
    assert (recipe.local.lr, recipe.num_rounds, training.weight_decay) == (0.5, 3, 0.25)
    assert (training.lr, training.batch_size, recipe.study.control) == (1e-5, 32, "digits")
    assert read_suite(None, {"model": "m", "quick": True})[1].batch_size == 128
