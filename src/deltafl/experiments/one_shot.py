"""One-shot federated learning: search method and coefficients over saved fine-tunes, test once, write the winner."""

import itertools
import json
import platform
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from deltafl.algebra.aggregate import as_weights
from deltafl.errors import DeltaflError
from deltafl.merge.inputs import Opened, open_updates
from deltafl.merge.plan import Plan, plan_merge, read_training
from deltafl.merge.run import run_merge
from deltafl.merge.search import (
    Goal,
    Problem,
    Row,
    SearchResult,
    check_methods,
    curves,
    grid_of,
    search,
    test_once,
    test_singles,
)
from deltafl.merge.search_recipe import SearchRecipe, TaskModel
from deltafl.models import LoadedEncoder, load_encoder
from deltafl.models.flat import FlatModel
from deltafl.models.heads import HEAD_FILE, ZERO_SHOT, check_head, load_head
from deltafl.progress import OnProgress, Progress, ignore
from deltafl.rules.rule import Source, build_rule
from deltafl.tasks.arrays import Task, load_arrays
from deltafl.training.legacy import Accuracy, zero_shot_for
from deltafl.version import __version__

SINGLE, BASE = "single-task models", "base (unmerged)"


def run_search(
    recipe: SearchRecipe,
    out: str | Path | None,
    *,
    tasks: Sequence[Task] | None = None,
    scores: Path | None = None,
    overwrite: bool = False,
    on_progress: OnProgress = ignore,
) -> dict[str, Any]:
    """Search, test once, merge the winner into OUT (if given); returns the result that report and tables are made of.

    Where no candidate is better than the base, OUT is not written, and `best` in the result has method "base".
    tasks: those of the models, in their order; None: as their `data` says. scores: a file for the validation scores of
    every example (see `save_scores`). Raises DeltaflError before any work if names, heads, tasks or methods do not fit.
    """
    started = time.perf_counter()
    plan = plan_merge(recipe.merge())
    check_methods(recipe.grids, recipe.scaling_coefs, plan.sources)
    for entry in recipe.fixed.values():
        check_methods([(entry.method, entry.params)], [entry.scaling_coef], plan.sources)
    encoder = load_encoder(recipe.base)
    if tasks is None:
        tasks = [
            _task(entry, name, plan, encoder, recipe)
            for name, entry in zip(plan.layouts, recipe.models, strict=True)
        ]
    if len({t.name for t in tasks}) < len(tasks):
        raise DeltaflError("two models have one task; a search wants one model for each task")
    number, most = itertools.count(1), most_rows(recipe)
    with open_updates(plan, recipe.memory) as opened:
        problem = _problem(recipe, plan, opened, encoder, tasks)
        found = search(
            problem,
            recipe.grids,
            lambdas=recipe.scaling_coefs,
            native_scale=recipe.grid == "paper",
            metric=recipe.metric,
            strategy=recipe.strategy,
            confidence=recipe.confidence,
            each_method=recipe.each_method,
            seed=recipe.seed or 0,
            memory=recipe.memory,
            on_row=lambda row: on_progress(Progress("search on validation", next(number), most)),
        )
        result = describe(recipe, plan, problem, found)
    if scores is not None:
        save_scores(found, scores)
    if out is not None and found.best.method != "base":
        best = found.best
        winner = recipe.merge(best.method, scaling_coef=best.scaling_coef, **best.params)
        run_merge(plan_merge(winner), out, overwrite=overwrite)
    return {**result, "seconds": time.perf_counter() - started}


def save_scores(found: SearchResult, path: Path) -> None:
    """One safetensors file: task -> (C, N), the score of every candidate that saw all validation examples on each.

    Its metadata hold the labels of the C candidates, in order (JSON).
    """
    labels = list(found.correct)
    tasks = {
        name: torch.stack([found.correct[label][name] for label in labels])
        for name in found.base.val
    }
    save_file(tasks, path, metadata={"candidates": json.dumps(labels)})


def most_rows(recipe: SearchRecipe) -> int:
    """Rows of the whole grid, for a progress bar."""
    points = sum(len(grid_of(method, params, (0.0, 1.0))) for method, params in recipe.grids)
    return 1 + len(recipe.scaling_coefs) * points


def _task(
    entry: TaskModel,
    name: str,
    plan: Plan,
    encoder: LoadedEncoder,
    recipe: SearchRecipe,
) -> Task:
    """The task of a model, with the validation split that its training held out, unless the recipe says otherwise."""
    given, seed = encoder.input, recipe.seed
    if seed is None:
        seed = int(read_training(plan.layouts[name]).get("seed") or 0)
    return load_arrays(
        entry.data,
        image_size=given.image_size,
        channels=given.channels,
        seed=seed,
        data_dir=recipe.data_dir,
    )


def _problem(
    recipe: SearchRecipe, plan: Plan, opened: Opened, encoder: LoadedEncoder, tasks: Sequence[Task]
) -> Problem:
    goals, problems = [], []
    for name, entry, task in zip(plan.layouts, recipe.models, tasks, strict=True):
        path = Path(entry.head) if entry.head else plan.layouts[name].folder / HEAD_FILE
        try:
            head = (
                zero_shot_for(encoder, task, recipe.templates)
                if entry.head == ZERO_SHOT
                else load_head(path)
            )
            check_head(head, encoder.feature_dim, task.class_names, str(path))
        except DeltaflError as error:
            problems.extend(error.problems)
            continue
        val, test = (Accuracy(split, head, recipe.batch_size) for split in (task.val, task.test))
        goals.append(Goal(task.name, val, test, opened.tuned[name]))
    if problems:
        raise DeltaflError(*problems)
    model = FlatModel(encoder.copy_to(recipe.device))
    return Problem(model, opened.base, opened.updates, goals, opened.weights, plan.threads)


def describe(
    recipe: SearchRecipe, plan: Plan, problem: Problem, found: SearchResult
) -> dict[str, Any]:
    """The result as plain values; this is where the test split is looked at, once for each reported row."""
    single = test_singles(problem)
    base = test_once(problem, found.base, None)
    rows = [_row(SINGLE, None, single, single), _row(BASE, found.base, base, single)]
    for method, best in found.best_of.items():
        test = test_once(problem, best, build_rule(method, best.params))
        rows.append(_row(method, best, test, single))
    total = sum(map(abs, as_weights(problem.weights, len(problem.updates)).default))
    for name, entry in recipe.fixed.items():
        coefficient = entry.scaling_coef
        row = Row(entry.method, entry.params, coefficient, total * coefficient)
        test = test_once(problem, row, build_rule(row.method, row.params))
        rows.append({**_row(name, row, test, single), "val": None})
    norms = found.norms
    lengths = found.gram.diagonal().sqrt().clamp_min(1e-30)
    return {
        "title": f"{len(problem.goals)} tasks, one model",
        "seed": recipe.seed,
        "tasks": [g.name for g in problem.goals],
        "metric": "accuracy",
        "criterion": recipe.metric,
        "strategy": recipe.strategy,
        "examples": {"evaluated": found.examples, "exhaustive": found.exhaustive_examples},
        "single": single,
        "single_val": dict(found.single),
        "rows": rows,
        "best": candidate(found.best),
        "curves": {name: [list(point) for point in curve] for name, curve in curves(found)},
        "chosen": {name: row.scaling_coef for name, row in found.best_of.items()},
        "cosine": {
            "names": [u.source.name for u in problem.updates],
            "matrix": (found.gram / lengths[:, None] / lengths[None, :]).tolist(),
        },
        "training": [
            _trained(goal.name, update.source, norm, read_training(plan.layouts[update.source.name]))
            for goal, update, norm in zip(problem.goals, problem.updates, norms, strict=True)
        ],
        "candidates": [candidate(row) for row in found.rows],
        "versions": {"deltafl": __version__, "torch": torch.__version__, "python": platform.python_version()},
    }  # fmt: skip


def _row(
    name: str, row: Row | None, test: Mapping[str, float], single: Mapping[str, float]
) -> dict[str, Any]:
    normalized = (
        sum(test[t] / single[t] for t in test) / len(test) if all(single.values()) else None
    )
    return {
        "rule": name,
        "params": dict(row.params) if row else {},
        "scaling_coef": row.scaling_coef if row else None,
        "server_lr": row.server_lr if row else None,
        "val": row.value if row else None,
        "test": dict(test),
        "mean": sum(test.values()) / len(test),
        "normalized": normalized,
    }


def _trained(task: str, source: Source, norm: float, training: Mapping[str, Any]) -> dict[str, Any]:
    known = {
        "lr": training.get("lr"),
        "num_steps": source.num_steps,
        "num_examples": source.num_examples,
    }
    return {"task": task, "model": source.name, **known, "norm": norm}


def candidate(row: Row) -> dict[str, Any]:
    """One row of the search as plain values."""
    return {"method": row.method, "params": dict(row.params), "scaling_coef": row.scaling_coef,
            "server_lr": row.server_lr, "val": dict(row.val), "value": row.value, "same_as": row.same_as,
            "evaluated": row.evaluated, "dropped_at": row.dropped_at}  # fmt: skip
