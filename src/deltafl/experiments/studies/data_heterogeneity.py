"""Does it matter how far the tasks are apart? Subsets of tasks near and far, and one data set split by class."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from deltafl.algebra.aggregate import as_weights
from deltafl.algebra.deltas import Deltas, Update
from deltafl.algebra.reductions import gram_matrix
from deltafl.experiments.one_shot import BASE, SINGLE
from deltafl.experiments.studies.merging import Merge, Tuned, Work, normalised, row_of, settled
from deltafl.experiments.studies.statistics import gained, summary
from deltafl.experiments.studies.study import Data, Study
from deltafl.experiments.studies.training_heterogeneity import REFERENCE
from deltafl.merge.task_vector import TaskVector
from deltafl.rules.rule import Source

PARTS = (2, 4)
"""Groups of classes that a data set is split into."""


def data_heterogeneity(study: Study, work: Work) -> dict[str, Any]:
    """Normalised test accuracy of every rule for subsets of 2 .. T tasks, the nearest and the farthest of each size.

    Near and far by the mean cosine of the task vectors. Beside them the classes of one data set dealt to 2 and to 4
    models, with one head for all. All models have one training.
    """
    asked: list[tuple[dict[str, Any], Merge]] = []
    for seed in study.seeds:
        models = [Tuned(Data(spec), study.training, seed) for spec in study.tasks]
        work.fine_tune(models)
        cosines = work.each("compare", _cosines, [Merge(tuple(models))])[0]
        asked += [
            ({"subset": name, "size": len(subset)}, Merge(tuple(models[i] for i in subset)))
            for name, subset in subsets(torch.tensor(cosines))
        ]
        classes = len(study.task(Data(study.split), seed).class_names)
        for parts in (p for p in PARTS if p <= classes):
            group = tuple(
                Tuned(Data(study.split, i, parts), study.training, seed) for i in range(parts)
            )
            asked.append(({"subset": "classes of one data set", "size": parts}, Merge(group)))
    results = work.search([merge for _, merge in asked])
    cells = list(dict.fromkeys((labels["subset"], labels["size"]) for labels, _ in asked))
    held = {
        cell: [
            r
            for (labels, _), r in zip(asked, results, strict=True)
            if (labels["subset"], labels["size"]) == cell
        ]
        for cell in cells
    }
    rules = [name for name, _ in study.methods]
    return {
        "rows": [
            row
            for cell in sorted(cells, key=lambda c: (c[0], c[1]))
            for rule in (SINGLE, BASE, *rules)
            if (row := _row(cell, rule, held[cell])) is not None
        ],
        "notes": sorted(
            {f"{name}: {why}" for result in results for name, why in result["left_out"].items()}
        ),
    }


def subsets(cosines: Tensor) -> list[tuple[str, tuple[int, ...]]]:
    """("near" | "far" | "all", subset) for every size from 2 to T, by the mean cosine (T, T) of its pairs."""
    count, found = len(cosines), []
    for size in range(2, count):
        ranked = sorted(
            itertools.combinations(range(count), size), key=lambda s: mean_cosine(cosines, s)
        )
        found += [("near", ranked[-1]), ("far", ranked[0])]
    return [*found, ("all", tuple(range(count)))]


def mean_cosine(cosines: Tensor, subset: Sequence[int]) -> float:
    """Over all pairs of the subset."""
    pairs = [float(cosines[i, j]) for i, j in itertools.combinations(subset, 2)]
    return sum(pairs) / len(pairs)


def _cosines(study: Study, merge: Merge) -> list[list[float]]:
    """The cosines of the task vectors of all models, (T, T)."""
    updates = []
    for model in merge.models:
        folder = study.model(model.data, model.training, model.seed)
        updates.append(
            Update(TaskVector.from_checkpoints(study.base, folder).tensors, Source(folder.name))
        )
    gram = gram_matrix(Deltas(updates, as_weights(None, len(updates))), 1)
    lengths = gram.diagonal().sqrt().clamp_min(1e-30)
    return (gram / lengths[:, None] / lengths[None, :]).tolist()


def _row(
    cell: tuple[str, int], rule: str, results: Sequence[Mapping[str, Any]]
) -> dict[str, Any] | None:
    gains, values, cosines = [], [], []
    for result in results:
        rows = {SINGLE: row_of(result, SINGLE), BASE: row_of(result, BASE), **settled(result)}
        if rule not in rows:
            continue
        matrix = torch.tensor(result["cosine"]["matrix"])
        values.append(normalised(rows[rule]))
        gains.append(normalised(rows[rule]) - normalised(rows[REFERENCE]))
        cosines.append(mean_cosine(matrix, range(len(matrix))))
    if not values:
        return None
    return {
        "subset": cell[0],
        "size": cell[1],
        "cosine": summary(cosines).mean,
        "rule": rule,
        **asdict(summary(values)),
        **gained(gains, told=rule not in (SINGLE, BASE, REFERENCE)),
    }
