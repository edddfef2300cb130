"""Studies of merges: do the rules help where models were trained differently, or on tasks that are
far apart, and how far along the merged delta should one go?
"""

import inspect
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, TypeVar

import numpy as np
import pandas as pd
import torch

from deltafl.errors import DeltaflError
from deltafl.experiments.study import Data, FineTune, Study, judged, task_of
from deltafl.experiments.sweep import (
    Cell,
    Found,
    Result,
    Store,
    Sweep,
    Work,
    mean_curves,
    points_of,
    require_done,
    tabulate,
)
from deltafl.merge.candidates import Method, check_methods
from deltafl.merge.search_recipe import SearchRecipe
from deltafl.merge.search_run import SINGLE, UNMERGED, run_search
from deltafl.rules.building import load_rules
from deltafl.rules.rule import ExampleRule, Source
from deltafl.seeding import keyed_generator
from deltafl.tasks import Task

T = TypeVar("T")

REFERENCE = "task_arithmetic"
"""What gains are measured against."""


@dataclass(frozen=True)
class Merging(Work):
    """A work on fine-tunes of one study."""

    models: tuple[FineTune, ...]

    @property
    def study(self) -> Study:
        """That of the models."""
        return self.models[0].study

    def needs(self) -> Iterable[Work]:
        return self.models

    def content(self) -> Mapping[str, object]:
        judging = {"scaling_coefs", "val_limit", "test_limit"}
        return {**vars(self), **self.study.recipe.model_dump(include=judging)}


@dataclass(frozen=True)
class Search(Merging):
    """A search over merges; its points are the rules with their test scores.

    rules: (): those of the study. examples: given to each of those that need some. written: data
    sets and scores that rows are tested on too.
    """

    strategy: str
    rules: tuple[str, ...] = ()
    examples: int = ExampleRule.examples
    written: tuple[tuple[str, str], ...] = ()
    kind: ClassVar[str] = "searches"

    @property
    def also(self) -> list[Task]:
        """The tasks of `written`."""
        return [judged(self.study, Data(spec, score=score)) for spec, score in self.written]

    def methods(self) -> tuple[list[Method], dict[str, str]]:
        """Those that these models can be merged by, and why the others cannot."""
        sources = [
            Source(m.task.name, num_steps=m.steps, num_examples=m.task.size("train"))
            for m in self.models
        ]
        good, left_out = [], {}
        for name in self.rules or self.study.recipe.compared:
            rule = load_rules()[name]
            own = {"examples": self.examples} if issubclass(rule, ExampleRule) else {}
            method = name, rule.seeded({**rule.values, **own}, self.study.seed)
            try:
                check_methods([method], sources)
                good.append(method)
            except DeltaflError as error:
                left_out[name] = error.problems[0]
        return good, left_out

    def content(self) -> Mapping[str, object]:
        good, left_out = self.methods()
        code = [inspect.getfile(load_rules()[name]) for name, _ in good]
        known = {"methods": good, "code": code, "left_out": left_out}
        return {**super().content(), **known, "written": [t.fingerprint() for t in self.also]}

    def run(self, folder: Path, store: Store) -> Result:
        good, left_out = self.methods()
        recipe = SearchRecipe.of(
            base=self.study.base,
            models=[{"path": str(store.place(m)), "data": m.data.spec} for m in self.models],
            methods=[{"method": name, **params} for name, params in good],
            scaling_coefs=self.study.recipe.scaling_coefs,
            strategy=self.strategy,
            each_method=True,
            seed=self.study.seed,
            threads=1,
            device=self.study.device,
        )
        tasks = [judged(self.study, model.data) for model in self.models]
        found = run_search(recipe, None, tasks=tasks, also=self.also)
        kept = {key: found[key] for key in ("tasks", "training", "rows", "curves", "cosine")}
        return {**kept, "left_out": left_out, "points": self._points(found)}

    def _points(self, found: Result) -> list[dict[str, object]]:
        """Of every row: the scores, and how far the models and their trainings are apart."""
        matrix = np.array(found["cosine"]["matrix"], dtype=float)
        rows = pd.DataFrame(told(found["rows"])).set_index("rule").astype({"normalized": float})
        gains = rows["normalized"] - rows["normalized"][REFERENCE]
        points = rows[["normalized", "mean", "scaling_coef"]].assign(
            worst=[min(test.values()) for test in rows["test"]],
            gain=gains.drop([SINGLE, UNMERGED, REFERENCE]),
            seed=self.study.seed,
            steps_ratio=_ratio([model.steps for model in self.models]),
            norm_ratio=_ratio([training["norm"] for training in found["training"]]),
            cosine=mean_cosine(matrix, range(len(matrix))),
        )
        return points.rename(columns={"mean": "accuracy"}).reset_index().to_dict("records")


def told(rows: Sequence[Result]) -> list[Result]:
    """The rows of a search: the base's, lambda 0, where validation puts that above everything that
    a rule gives.
    """
    base = next(row for row in rows if row["rule"] == UNMERGED)
    return [
        {**base, "rule": row["rule"]} if row["rule"] != SINGLE and row["val"] < base["val"] else row
        for row in rows
    ]


def _ratio(values: Sequence[float]) -> float:
    return max(values) / min(values) if min(values) > 0 else math.inf


def mean_cosine(cosines: np.ndarray, subset: Sequence[int]) -> float:
    """Over all pairs of the subset."""
    return float(np.mean([cosines[pair] for pair in itertools.combinations(subset, 2)]))


KINDS = {
    "alike": (False, False),
    "steps differ": (False, True),
    "lr differs": (True, False),
    "both differ": (True, True),
}
"""Kind of merge -> whether its models differ in lr and in steps."""

PARTS = (2, 4)
"""Groups of classes that a data set is split into."""


def training_heterogeneity(study: Study, sweep: Sweep) -> list[Cell]:
    """`draws` merges of every kind: each gives every task one of the lrs x steps trainings."""
    return [Cell({"kind": kind}, merge) for kind in KINDS for merge in draws(study, kind)]


def draws(study: Study, kind: str) -> list[Search]:
    """Different merges of one kind, as many as `draws` where there are so many; by the seed."""
    recipe, generator = study.recipe, keyed_generator(study.seed, "draws", kind)
    specs, differ = recipe.tasks, KINDS[kind]

    def drawn(values: Sequence[T], several: bool) -> list[T]:
        """One of the values for each task, or one for all."""
        ids = torch.randint(len(values), (len(specs) if several else 1,), generator=generator)
        return [values[i] for i in ids.expand(len(specs)).tolist()]

    found: dict[Search, None] = {}
    for _ in range(50 * recipe.draws):
        lrs, steps = drawn(recipe.lr_values, differ[0]), drawn(recipe.steps_values, differ[1])
        if (len({*lrs}) > 1, len({*steps}) > 1) == differ:
            models = tuple(map(study.tuned, map(Data, specs), lrs, steps))
            found[Search(models, recipe.search_strategy)] = None
        if len(found) == recipe.draws:
            break
    return list(found)


def training_rows(found: Found) -> Result:
    """For every kind and rule: normalised test score, and the gain over task arithmetic on the same
    models, with Student's interval over all draws of all seeds; draws of one seed share models, so
    that it is a little too narrow. relations: Pearson's r of the gain with the logarithm of how
    many times the largest steps and norm of a merge are the smallest.
    """
    points = points_of(found)
    logs = {key: np.log(points[f"{key}_ratio"]) for key in ("steps", "norm")}
    gained = points.assign(**logs).dropna(subset="gain").groupby("rule", sort=False)
    relations = []
    for rule, own in gained:
        r = own.corr(min_periods=3, numeric_only=True)["gain"]
        relations.append({"rule": rule, "points": len(own), **{key: r[key] for key in logs}})
    rows = tabulate(points, ["kind", "rule"], "normalized", "accuracy")
    return {"rows": rows, "relations": relations}


def data_heterogeneity(study: Study, sweep: Sweep) -> list[Cell]:
    """Subsets of 2 .. T tasks, the nearest and the farthest of each size by the mean cosine of
    their task vectors; beside them the classes of one data set dealt to 2 and to 4 models, with one
    head for all. All models have one training.
    """
    recipe = study.recipe
    models = tuple(study.tuned(Data(spec)) for spec in recipe.tasks)
    found = sweep([Search(models, recipe.search_strategy)])
    require_done(found)
    cosines = np.nan_to_num(np.array(found[0]["cosine"]["matrix"], dtype=float))
    merges = [(name, tuple(models[i] for i in subset)) for name, subset in subsets(cosines)]
    classes = len(task_of(study, Data(recipe.dealt)).groups("train").unique())
    for parts in (p for p in PARTS if p <= classes):
        dealt = tuple(study.tuned(Data(recipe.dealt, i, parts)) for i in range(parts))
        merges.append(("classes of one data set", dealt))
    return [
        Cell({"subset": name, "size": len(merged)}, Search(merged, recipe.search_strategy))
        for name, merged in merges
    ]


def subsets(cosines: np.ndarray) -> list[tuple[str, tuple[int, ...]]]:
    """("near" | "far" | "all", subset) for each size from 2 to T, by the mean cosine of pairs."""
    count, found = len(cosines), []
    for size in range(2, count):
        candidates = itertools.combinations(range(count), size)
        ranked = sorted(candidates, key=lambda subset: mean_cosine(cosines, subset))
        found += [("near", ranked[-1]), ("far", ranked[0])]
    return [*found, ("all", tuple(range(count)))]


def data_rows(found: Found) -> Result:
    """Normalised test score of every rule for every subset, and the gain over task arithmetic."""
    points = points_of(found).sort_values(["subset", "size"], kind="stable")
    by = ["subset", "size", "rule"]
    return {"rows": tabulate(points, by, "normalized", "accuracy", "cosine")}


def scaling_coef(study: Study, sweep: Sweep) -> list[Cell]:
    """One merge of all tasks, searched exhaustively: every point of a curve is exact."""
    models = tuple(study.tuned(Data(spec)) for spec in study.recipe.tasks)
    return [Cell({}, Search(models, "exhaustive"))]


def scaling_rows(found: Found) -> Result:
    """The mean curve of every rule over seeds (the best of its other parameters at each lambda),
    and its test score.
    """
    points = points_of(found).drop(columns="gain")
    return {
        "rows": tabulate(points, ["rule"], "normalized", "accuracy", "scaling_coef"),
        "by_lambda": mean_curves(item for _, one in found for item in one["curves"].items()),
    }
