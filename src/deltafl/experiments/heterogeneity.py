"""Do the rules help where models were trained differently, or on tasks that are far apart?"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from deltafl.algebra.deltas import Deltas, Update
from deltafl.algebra.reductions import gram_matrix
from deltafl.errors import DeltaflError
from deltafl.experiments.statistics import correlation, gains, summary
from deltafl.experiments.study import (
    SINGLE,
    UNMERGED,
    Data,
    FineTune,
    Search,
    Study,
    normalised,
    notes,
    rows_of,
)
from deltafl.experiments.sweep import Cell, Result, Store, Sweep, Work
from deltafl.merge.task_vector import TaskVector
from deltafl.rules.rule import Source
from deltafl.rules.weights import as_weights
from deltafl.seeding import keyed_generator

REFERENCE = "task_arithmetic"
"""What gains are measured against."""

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
    """`draws` merges of every kind and seed: each gives every task one of the lrs x steps trainings.

    Raises:
        DeltaflError: only one lr or one number of steps is given.
    """
    return [
        Cell({"kind": kind}, merge)
        for seed in study.seeds
        for kind in KINDS
        for merge in draws(study, kind, seed)
    ]


def draws(study: Study, kind: str, seed: int) -> list[Search]:
    """Different merges of one kind, as many as `study.draws` where there are so many; by the seed."""
    generator = keyed_generator(seed, "draws", kind)
    axes = [(study.lrs, KINDS[kind][0]), (study.steps, KINDS[kind][1])]
    found: dict[Search, None] = {}
    for _ in range(50 * study.draws):
        lrs, steps = (_drawn(study, values, differ, generator) for values, differ in axes)
        if [len(set(lrs)) > 1, len(set(steps)) > 1] == [differ for _, differ in axes]:
            tuned = zip(study.tasks, lrs, steps, strict=True)
            models = tuple(FineTune(study, Data(s), lr, n, seed) for s, lr, n in tuned)
            found[Search(models, study.strategy)] = None
        if len(found) == study.draws:
            break
    if not found:
        raise DeltaflError(
            f'training-heterogeneity: no merge where "{kind}"; give at least two tasks, two of '
            "--lr-values and two of --steps-values"
        )
    return list(found)


def _drawn(
    study: Study, values: Sequence[Any], differ: bool, generator: torch.Generator
) -> list[Any]:
    """One of the values for each task, or one for all."""
    count = len(study.tasks)
    ids = torch.randint(len(values), (count if differ else 1,), generator=generator).tolist()
    return [values[i] for i in ids] * (1 if differ else count)


def training_rows(study: Study, cells: Sequence[Cell], results: Sequence[Result]) -> dict[str, Any]:
    """For every kind and rule: normalised test score, and the gain over task arithmetic on the same
    models, with Student's interval over all draws of all seeds; draws of one seed share models, so
    that it is a little too narrow. relations: Pearson's r of the gain with how far trainings are
    apart.
    """
    points = [point for cell, r in zip(cells, results, strict=True) for point in _points(cell, r)]
    rules = [name for name, _ in study.methods]
    rows = []
    for kind, rule in itertools.product(KINDS, (SINGLE, UNMERGED, *rules)):
        if group := [p for p in points if p["kind"] == kind and p["rule"] == rule]:
            rows.append({"kind": kind, **_row(rule, group)})
    relations = [
        {"rule": rule, "points": len(group), **_relations(group)}
        for rule in rules
        if rule != REFERENCE and (group := [p for p in points if p["rule"] == rule])
    ]
    kept = [p for p in points if p["rule"] in rules]
    return {"rows": rows, "points": kept, "relations": relations, "notes": notes(results)}


def _points(cell: Cell, result: Result) -> list[dict[str, Any]]:
    """One point for each row of a search: its score, its gain, how far the trainings are apart."""
    assert isinstance(cell.work, Search)
    models, rows = cell.work.models, rows_of(result)
    apart = {
        "steps_ratio": _ratio([m.steps for m in models]),
        "lr_ratio": _ratio([m.lr for m in models]),
        "norm_ratio": _ratio([t["norm"] for t in result["training"]]),
    }
    matrix = torch.tensor(result["cosine"]["matrix"])
    return [
        {
            **cell.labels,
            "rule": name,
            "seed": cell.work.seed,
            "accuracy": row["mean"],
            "normalized": normalised(row),
            "gain": normalised(row) - normalised(rows[REFERENCE]),
            "scaling_coef": row["scaling_coef"],
            "cosine": mean_cosine(matrix, range(len(matrix))),
            **apart,
        }
        for name, row in rows.items()
    ]


def _ratio(values: Sequence[float]) -> float:
    return max(values) / min(values) if min(values) > 0 else math.inf


def _row(rule: str, points: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Means of one rule's points; a gain says something of rules other than the reference only."""
    counted = [] if rule in (SINGLE, UNMERGED, REFERENCE) else [p["gain"] for p in points]
    return {
        "rule": rule,
        **asdict(summary([p["normalized"] for p in points])),
        "accuracy": summary([p["accuracy"] for p in points]).mean,
        **gains(counted),
    }


def _relations(points: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """Pearson's r of the gain with the log of the largest over the smallest steps and norms."""
    gained = [p["gain"] for p in points]
    return {
        key: correlation([math.log(p[f"{key}_ratio"]) for p in points], gained)
        for key in ("steps", "norm")
        if all(math.isfinite(p[f"{key}_ratio"]) for p in points)
    }


@dataclass(frozen=True)
class Compare(Work):
    """The cosines of the task vectors of fine-tunes."""

    models: tuple[FineTune, ...]
    kind: ClassVar[str] = "comparisons"

    def needs(self) -> Sequence[Work]:
        return self.models

    def content(self, store: Store) -> Mapping[str, Any]:
        return {"models": [model.content(store) for model in self.models]}

    def run(self, folder: Path, store: Store) -> Result:
        base = self.models[0].study.base
        updates = [
            Update(TaskVector.from_checkpoints(base, place).tensors, Source(place.name))
            for place in map(store.place, self.models)
        ]
        gram = gram_matrix(Deltas(updates, as_weights(None, len(updates))), 1)
        lengths = gram.diagonal().sqrt().clamp_min(1e-30)
        return {"cosines": (gram / lengths[:, None] / lengths[None, :]).tolist()}


def data_heterogeneity(study: Study, sweep: Sweep) -> list[Cell]:
    """Subsets of 2 .. T tasks, the nearest and the farthest of each size by the mean cosine of their
    task vectors; beside them the classes of one data set dealt to 2 and to 4 models, with one head
    for all. All models have one training.
    """
    cells = []
    for seed in study.seeds:
        models = tuple(study.tuned(Data(spec), seed) for spec in study.tasks)
        cosines = torch.tensor(sweep([Compare(models)])[0]["cosines"])
        for name, subset in subsets(cosines):
            merge = Search(tuple(models[i] for i in subset), study.strategy)
            cells.append(Cell({"subset": name, "size": len(subset)}, merge))
        classes = len(study.task(Data(study.split), seed).groups("train").unique())
        for parts in (p for p in PARTS if p <= classes):
            dealt = (study.tuned(Data(study.split, i, parts), seed) for i in range(parts))
            labels = {"subset": "classes of one data set", "size": parts}
            cells.append(Cell(labels, Search(tuple(dealt), study.strategy)))
    return sorted(cells, key=lambda cell: tuple(cell.labels.values()))


def subsets(cosines: Tensor) -> list[tuple[str, tuple[int, ...]]]:
    """("near" | "far" | "all", subset) for every size from 2 to T, by the mean cosine of its pairs."""
    count, found = len(cosines), []
    for size in range(2, count):
        candidates = itertools.combinations(range(count), size)
        ranked = sorted(candidates, key=lambda subset: mean_cosine(cosines, subset))
        found += [("near", ranked[-1]), ("far", ranked[0])]
    return [*found, ("all", tuple(range(count)))]


def mean_cosine(cosines: Tensor, subset: Sequence[int]) -> float:
    """Over all pairs of the subset."""
    pairs = [float(cosines[i, j]) for i, j in itertools.combinations(subset, 2)]
    return sum(pairs) / len(pairs)


def data_rows(study: Study, cells: Sequence[Cell], results: Sequence[Result]) -> dict[str, Any]:
    """Normalised test score of every rule for every subset, and the gain over task arithmetic."""
    points = [point for cell, r in zip(cells, results, strict=True) for point in _points(cell, r)]
    rules = (SINGLE, UNMERGED, *(name for name, _ in study.methods))
    rows = []
    for subset, size in dict.fromkeys((p["subset"], p["size"]) for p in points):
        here = [p for p in points if (p["subset"], p["size"]) == (subset, size)]
        for rule in rules:
            if group := [p for p in here if p["rule"] == rule]:
                cosine = summary([p["cosine"] for p in group]).mean
                labels = {"subset": subset, "size": size, "cosine": cosine}
                rows.append(labels | _row(rule, group))
    return {"rows": rows, "notes": notes(results)}


def scaling_coef(study: Study, sweep: Sweep) -> list[Cell]:
    """One merge of all tasks for each seed, searched exhaustively: every point of a curve is exact."""
    return [
        Cell({}, Search(tuple(study.tuned(Data(s), seed) for s in study.tasks), "exhaustive"))
        for seed in study.seeds
    ]


def scaling_rows(study: Study, cells: Sequence[Cell], results: Sequence[Result]) -> dict[str, Any]:
    """The mean curve of every rule over seeds (the best of its other parameters at each lambda), and
    its test score.
    """
    rules = [name for name, _ in study.methods if name not in results[0]["left_out"]]
    found, rows = [rows_of(result) for result in results], []
    for rule in (SINGLE, UNMERGED, *rules):
        coefs = [r[rule]["scaling_coef"] for r in found if rule not in (SINGLE, UNMERGED)]
        rows.append(
            {
                "rule": rule,
                **asdict(summary([normalised(r[rule]) for r in found])),
                "accuracy": summary([r[rule]["mean"] for r in found]).mean,
                "scaling_coef": summary(coefs).mean if coefs else None,
            }
        )
    curves = {rule: [dict(map(tuple, r["curves"][rule])) for r in results] for rule in rules}
    return {
        "rows": rows,
        "curves": {rule: _mean_curve(curve) for rule, curve in curves.items()},
        "base": summary([r[UNMERGED]["val"] for r in found]).mean,
        "notes": notes(results),
    }


def _mean_curve(curves: Sequence[Mapping[float, float]]) -> list[tuple[float, float]]:
    shared = sorted(set.intersection(*(set(curve) for curve in curves)))
    return [(x, summary([curve[x] for curve in curves]).mean) for x in shared]
