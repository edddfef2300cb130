"""One-shot federated learning: search over saved fine-tunes, test once, write the winner."""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean

import torch
from safetensors.torch import save_file

from deltafl.algebra.tensors import device_named
from deltafl.errors import DeltaflError, attempt
from deltafl.merge.candidates import Row, check_methods
from deltafl.merge.examples import load_tasks, nets_for
from deltafl.merge.inputs import open_updates
from deltafl.merge.inspect import cosines, named_matrix, trainings
from deltafl.merge.plan import Facts, Plan, plan_merge
from deltafl.merge.run import VERSIONS, run_merge
from deltafl.merge.search import Goal, Problem, SearchResult, search
from deltafl.merge.search_recipe import SearchRecipe
from deltafl.models import HEAD_FILE, HeadRecipe, Net, load_net
from deltafl.progress import OnProgress, ignore
from deltafl.rules.rule import ExampleRule, build_rule
from deltafl.rules.weights import total_weight
from deltafl.tasks import Task
from deltafl.tasks.task import require_examples

SINGLE, UNMERGED = "single-task models", "base (unmerged)"
"""Rows of the table that are no merges."""


def run_search(
    recipe: SearchRecipe,
    out: str | Path | None,
    *,
    tasks: Sequence[Task] | None = None,
    scores: Path | None = None,
    on_progress: OnProgress = ignore,
) -> Facts:
    """Search, test once, merge the winner into OUT, if given; returns what report and tables show.

    Where no candidate is better than the base, OUT is not written, and `best` in the result has the
    method "base". tasks: those of the models, in their order; None: as their `data` says. scores: a
    file for the validation scores of every example (see `save_scores`).

    Raises:
        DeltaflError: before any work, names, heads, tasks or methods do not fit.
    """
    started = time.perf_counter()
    plan = plan_merge(recipe.merge())
    fixed = [(entry.method, entry.params) for entry in recipe.fixed.values()]
    check_methods([*recipe.grids, *fixed], plan.sources)
    net = load_net(recipe.base)
    net.module.eval().to(device_named(recipe.device))
    if tasks is None:
        tasks = load_tasks(plan, recipe.models, net, recipe.data_dir, recipe.seed)
    nets = nets_for(net, tasks, _heads(recipe, plan, net, tasks))
    opened = open_updates(plan, recipe.memory)
    judged = zip(tasks, nets, opened.tuned.values(), strict=True)
    problem = Problem(opened, [Goal(*parts, recipe.batch_size) for parts in judged])
    found = search(problem, recipe, on_progress)
    result = _describe(recipe, plan, problem, found)
    if scores is not None:
        save_scores(found, scores)
    best = found.best
    if out is not None and best is not found.base:
        winner = recipe.merge(method=best.method, scaling_coef=best.scaling_coef, **best.params)
        rule = build_rule(best.method, best.params)
        by_examples = isinstance(rule.core, ExampleRule)
        make = (lambda opened: problem.found[rule.core]) if by_examples else None
        run_merge(plan_merge(winner), out, make=make)
    return {**result, "seconds": time.perf_counter() - started}


def save_scores(found: SearchResult, path: Path) -> None:
    """One safetensors file: task -> (C, N), scores of those that saw all validation examples.

    Its metadata hold the labels of the C candidates, in order (JSON).
    """
    tasks = {name: torch.stack([s[name] for s in found.scores.values()]) for name in found.single}
    save_file(tasks, path, metadata={"candidates": json.dumps(list(found.scores))})


def _heads(recipe: SearchRecipe, plan: Plan, net: Net, tasks: Sequence[Task]) -> list[HeadRecipe]:
    """The head of each model.

    Raises:
        DeltaflError: tasks do not fit one another, or the metric.
    """
    if len({task.name for task in tasks}) < len(tasks):
        raise DeltaflError("two models have one task; a search wants one model for each task")
    problems = list[str]()
    for task in tasks:
        attempt(problems, require_examples, task, "val", "test")
    for task in (task for task in tasks if not task.ratio_scaled):
        no_ratio = f'task "{task.name}": {task.metric} is no ratio, so that it cannot be'
        if recipe.metric == "normalized":
            problems.append(
                f"{no_ratio} divided by that of the task's own model; give --metric absolute"
            )
        if recipe.reference:
            problems.append(f"{no_ratio} compared in percent; leave reference out")
    if problems:
        raise DeltaflError(*problems)
    heads = []
    for layout, entry in zip(plan.layouts.values(), recipe.models, strict=True):
        own = str(layout.folder / HEAD_FILE) if net.takes_head else HeadRecipe.of().head
        templates = recipe.templates if entry.head == "zero-shot" else None
        heads.append(HeadRecipe.of(head=entry.head or own, templates=templates))
    return heads


def _describe(recipe: SearchRecipe, plan: Plan, problem: Problem, found: SearchResult) -> Facts:
    """The result as plain values; the test split is looked at here, once for each reported row."""
    single, tasks = problem.own_scores("test"), [goal.task for goal in problem.goals]
    ratios = all(task.ratio_scaled and single[task.name] > 0 for task in tasks)

    def row_of(name: str, row: Row | None) -> Facts:
        """A row of the table."""
        test = problem.test_scores(row) if row else single
        normalized = [score / single[task] for task, score in test.items()] if ratios else []
        known = asdict(row) if row else {"params": {}}
        return {
            "rule": name,
            **{key: known.get(key) for key in ("params", "scaling_coef", "server_lr")},
            "val": row.value if row and row.val else None,
            "test": test,
            "mean": fmean(test.values()),
            "normalized": fmean(normalized) if ratios else None,
        }

    named = [(SINGLE, None), (UNMERGED, found.base), *found.best_of.items()]
    for name, entry in recipe.fixed.items():
        coef, total = entry.scaling_coef, total_weight(problem.opened.weights)
        named.append((name, Row(entry.method, entry.params, coef, coef * total)))
    rows = [row_of(name, row) for name, row in named]
    norms = found.gram.diagonal().sqrt().tolist()
    known = zip(trainings(plan, norms), tasks, strict=True)
    return {
        "title": f"{len(tasks)} tasks, one model",
        "seed": recipe.seed,
        "tasks": [task.name for task in tasks],
        "metric": " or ".join(dict.fromkeys(task.metric for task in tasks)),
        "criterion": recipe.metric,
        "strategy": recipe.strategy,
        "examples": found.examples,
        "single": single,
        "single_val": found.single,
        "rows": rows,
        "best": asdict(found.best),
        "curves": found.curves,
        "chosen": {method: row.scaling_coef for method, row in found.best_of.items()},
        "cosine": named_matrix(list(plan.layouts), cosines(found.gram)),
        "training": [{**training, "task": task.name} for training, task in known],
        "candidates": [asdict(row) for row in found.rows],
        "versions": VERSIONS,
    }
