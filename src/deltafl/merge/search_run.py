"""One-shot federated learning: search over saved fine-tunes, test once, write the winner."""

import json
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from deltafl.algebra.tensors import device_named
from deltafl.errors import DeltaflError
from deltafl.merge.candidates import Row, check_methods
from deltafl.merge.inputs import open_updates
from deltafl.merge.inspect import cosines, named_matrix, trainings
from deltafl.merge.plan import Plan, plan_merge, read_training
from deltafl.merge.problem import Goal, Problem
from deltafl.merge.run import run_merge
from deltafl.merge.search import SearchResult, search
from deltafl.merge.search_recipe import SearchRecipe
from deltafl.models import HEAD_FILE, HeadRecipe, Net, load_net
from deltafl.progress import OnProgress, ignore
from deltafl.tasks import DataRecipe, Task, load_task
from deltafl.tasks.recipe import DataSource
from deltafl.training.step import TaskScorer
from deltafl.version import __version__

SINGLE, UNMERGED = "single-task models", "base (unmerged)"
"""Rows of the table that are no merges."""


def run_search(
    recipe: SearchRecipe,
    out: str | Path | None,
    *,
    tasks: Sequence[Task] | None = None,
    scores: Path | None = None,
    overwrite: bool = False,
    on_progress: OnProgress = ignore,
) -> dict[str, Any]:
    """Search, test once, merge the winner into OUT, if given; returns what report and tables show.

    Where no candidate is better than the base, OUT is not written, and `best` in the result has the
    method "base". tasks: those of the models, in their order; None: as their `data` says. scores: a
    file for the validation scores of every example (see `save_scores`).

    Raises:
        DeltaflError: before any work, names, heads, tasks or methods do not fit.
    """
    started = time.perf_counter()
    plan = plan_merge(recipe.merge())
    check_methods(recipe.grids, plan.sources)
    for entry in recipe.fixed.values():
        check_methods([(entry.method, entry.params)], plan.sources)
    net = load_net(recipe.base)
    net.module.eval().to(device_named(recipe.device))
    tasks = _tasks(recipe, plan, net) if tasks is None else tasks
    nets = _nets(recipe, plan, net, tasks)
    with open_updates(plan, recipe.memory) as opened:
        goals = [
            Goal(task.name, net, *_scorers(task, recipe.batch_size), opened.tuned[name])
            for name, task, net in zip(plan.layouts, tasks, nets, strict=True)
        ]
        problem = Problem(opened.base, opened.updates, goals, opened.weights["*"], plan.threads)
        found = search(problem, recipe, on_progress)
        result = _describe(recipe, plan, problem, tasks, found)
    if scores is not None:
        save_scores(found, scores)
    best = found.best
    if out is not None and best is not found.base:
        winner = recipe.merge(best.method, scaling_coef=best.scaling_coef, **best.params)
        run_merge(plan_merge(winner), out, overwrite=overwrite)
    return {**result, "seconds": time.perf_counter() - started}


def save_scores(found: SearchResult, path: Path) -> None:
    """One safetensors file: task -> (C, N), scores of those that saw all validation examples.

    Its metadata hold the labels of the C candidates, in order (JSON).
    """
    tasks = {
        name: torch.stack([scores[name] for scores in found.scores.values()])
        for name in found.single
    }
    save_file(tasks, path, metadata={"candidates": json.dumps(list(found.scores))})


def _tasks(recipe: SearchRecipe, plan: Plan, net: Net) -> list[Task]:
    """The task of each model, with the validation split that its training held out, if not told."""
    tasks = []
    for layout, entry in zip(plan.layouts.values(), recipe.models, strict=True):
        seed = recipe.seed
        if seed is None:
            seed = read_training(layout).get("seed") or 0
        source = entry.model_dump(include={*DataSource.model_fields})
        data = DataRecipe.of(**source, data_dir=recipe.data_dir)
        tasks.append(load_task(data, net.inputs, seed))
    return tasks


def _nets(recipe: SearchRecipe, plan: Plan, net: Net, tasks: Sequence[Task]) -> list[Net]:
    """For each model a net with the head of its task; all share the weights of `net`.

    Raises:
        DeltaflError: heads or tasks do not fit the models, or the metric the tasks.
    """
    if len({task.name for task in tasks}) < len(tasks):
        raise DeltaflError("two models have one task; a search wants one model for each task")
    nets, problems = [], []
    for layout, entry, task in zip(plan.layouts.values(), recipe.models, tasks, strict=True):
        if recipe.metric == "normalized" and not task.ratio_scaled:
            problems.append(
                f'task "{task.name}": {task.metric} is no ratio, so that it cannot be divided by '
                "that of the task's own model; give --metric absolute"
            )
        own = str(layout.folder / HEAD_FILE) if net.takes_head else HeadRecipe().head
        head = HeadRecipe.of(
            head=entry.head or own,
            templates=recipe.templates if entry.head == "zero-shot" else None,
        )
        nets.append(net.sharing())
        try:
            nets[-1].prepare(task, head)
        except DeltaflError as error:
            problems += error.problems
    if problems:
        raise DeltaflError(*problems)
    return nets


def _scorers(task: Task, batch_size: int) -> tuple[TaskScorer, TaskScorer]:
    """On validation and on test data."""
    return TaskScorer(task, "val", batch_size), TaskScorer(task, "test", batch_size)


def _describe(
    recipe: SearchRecipe,
    plan: Plan,
    problem: Problem,
    tasks: Sequence[Task],
    found: SearchResult,
) -> dict[str, Any]:
    """The result as plain values; the test split is looked at here, once for each reported row."""
    single = problem.own_scores(test=True)
    units = single if all(t.ratio_scaled and single[t.name] > 0 for t in tasks) else None
    base = _row(UNMERGED, problem.test_scores(found.base), units, found.base)
    rows = [_row(SINGLE, single, units), base]
    rows += [_row(m, problem.test_scores(row), units, row) for m, row in found.best_of.items()]
    for name, entry in recipe.fixed.items():
        server_lr = problem.total_weight * entry.scaling_coef
        row = Row(entry.method, entry.params, entry.scaling_coef, server_lr)
        rows.append({**_row(name, problem.test_scores(row), units, row), "val": None})
    known = zip(trainings(plan, found.norms), tasks, strict=True)
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    return {
        "title": f"{len(tasks)} tasks, one model",
        "seed": recipe.seed,
        "tasks": [task.name for task in tasks],
        "metric": " or ".join(dict.fromkeys(task.metric for task in tasks)),
        "criterion": recipe.metric,
        "strategy": recipe.strategy,
        "examples": found.examples,
        "single": single,
        "single_val": dict(found.single),
        "rows": rows,
        "best": asdict(found.best),
        "curves": found.curves,
        "chosen": {method: row.scaling_coef for method, row in found.best_of.items()},
        "cosine": named_matrix(list(plan.layouts), cosines(found.gram)),
        "training": [{**training, "task": task.name} for training, task in known],
        "candidates": [asdict(row) for row in found.rows],
        "versions": {"deltafl": __version__, **versions},
    }


def _row(
    name: str, test: Mapping[str, float], units: Mapping[str, float] | None, row: Row | None = None
) -> dict[str, Any]:
    """One row of the table; units: what test scores are divided by to normalise them."""
    known = asdict(row) if row else {"params": {}}
    normalized = [score / units[task] for task, score in test.items()] if units else []
    return {
        "rule": name,
        **{key: known.get(key) for key in ("params", "scaling_coef", "server_lr")},
        "val": known.get("value"),
        "test": dict(test),
        "mean": sum(test.values()) / len(test),
        "normalized": sum(normalized) / len(normalized) if units else None,
    }
