"""One-shot federated learning: search over saved fine-tunes, test once, write the winner."""

import json
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import save_file

from deltafl.algebra.tensors import device_named
from deltafl.errors import DeltaflError
from deltafl.merge.candidates import Row, check_methods
from deltafl.merge.examples import load_tasks, nets_for
from deltafl.merge.inputs import open_updates
from deltafl.merge.inspect import cosines, named_matrix, trainings
from deltafl.merge.plan import Facts, Plan, plan_merge
from deltafl.merge.problem import Goal, Problem, Scale, mean_score
from deltafl.merge.run import VERSIONS, run_merge
from deltafl.merge.search import SearchResult, search
from deltafl.merge.search_recipe import SearchRecipe
from deltafl.models import HEAD_FILE, HeadRecipe, Net, load_net
from deltafl.progress import OnProgress, ignore
from deltafl.rules.building import build_rule
from deltafl.rules.rule import ExampleRule
from deltafl.rules.weights import total_weight
from deltafl.tasks import DataRecipe, Task, load_task
from deltafl.tasks.task import require_examples

SINGLE, UNMERGED = "single-task models", "base (unmerged)"
"""Rows of the table that are no merges."""


def run_search(
    recipe: SearchRecipe,
    out: str | Path | None,
    *,
    tasks: Sequence[Task] | None = None,
    also: Sequence[Task] = (),
    scores: Path | None = None,
    on_progress: OnProgress = ignore,
) -> Facts:
    """Search, test once, merge the winner into OUT, if given; returns what report and tables show.

    Where no candidate is better than the base, OUT is not written, and `best` in the result has the
    method "base". tasks: those of the models, in their order; None: as their `data` says. also:
    more than the recipe's. scores: a file for the validation scores of every example (see
    `save_scores`).

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
    sources = [DataRecipe.of(**dict(one), data_dir=recipe.data_dir) for one in recipe.also]
    others = [load_task(source, net.inputs, recipe.seed or 0) for source in sources] + [*also]
    for task in others:
        require_examples(task, "test")
    doing = zip(others, nets_for(net, others, [HeadRecipe.of()] * len(others)), strict=True)
    extra = [Goal(task, own, {}, recipe.batch_size) for task, own in doing]
    opened = open_updates(plan, recipe.memory)
    judged = zip(tasks, nets, opened.tuned.values(), strict=True)
    goals = [Goal(*parts, recipe.batch_size) for parts in judged]
    with TemporaryDirectory(prefix="deltafl-") as scratch:
        problem = Problem(opened, goals, Path(scratch))
        found = search(problem, recipe, on_progress)
        rows = _tested(recipe, problem, found, extra)
    result = _describe(recipe, plan, problem, found, rows)
    if scores is not None:
        save_scores(found, scores)
    best = found.best
    if out is not None and best is not found.base:
        winner = recipe.merge(method=best.method, scaling_coef=best.scaling_coef, **best.params)
        rule = build_rule(best.method, best.params)
        by_examples = isinstance(rule.core, ExampleRule)
        make = (lambda opened: problem.found[rule.core]) if by_examples else None
        run_merge(plan_merge(winner), out, make=make, rows=rows)
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
        DeltaflError: tasks do not fit one another, or published scores.
    """
    if len({task.name for task in tasks}) < len(tasks):
        raise DeltaflError("two models have one task; a search wants one model for each task")
    for task in tasks:
        require_examples(task, "val", "test")
    for task in (task for task in tasks if recipe.reference and not task.ratio_scaled):
        raise DeltaflError(
            f'task "{task.name}": {task.metric} is no ratio, so that it cannot be compared in '
            "percent; leave reference out"
        )
    heads = []
    for layout, entry in zip(plan.layouts.values(), recipe.models, strict=True):
        own = str(layout.folder / HEAD_FILE) if net.takes_head else HeadRecipe.of().head
        templates = recipe.templates if entry.head == "zero-shot" else None
        heads.append(HeadRecipe.of(head=entry.head or own, templates=templates))
    return heads


def _tested(
    recipe: SearchRecipe, problem: Problem, found: SearchResult, also: Sequence[Goal]
) -> list[Facts]:
    """The rows of the table; the test split is looked at here, once for each of them."""

    def others() -> dict[str, float]:
        """What the net as it is scores on the other tasks."""
        return {f"{g.task.name}, {g.task.metric}": mean_score(g.scores("test")) for g in also}

    single, apart = dict[str, float](), list[dict[str, float]]()
    for goal in problem.goals:
        goal.net.load(goal.tuned)
        single[goal.task.name] = mean_score(goal.scores("test"))
        apart.append(others())
    best = {name: max(one[name] for one in apart) for name in apart[0]}
    named = [(UNMERGED, found.base), *found.best_of.items()]
    for name, entry in recipe.fixed.items():
        coef, total = entry.scaling_coef, total_weight(problem.opened.weights)
        named.append((name, Row(entry.method, entry.params, coef, coef * total)))
    tested = [(SINGLE, None, single, best)]
    tested += [(name, row, problem.scores(row, "test"), others()) for name, row in named]
    rows, scales = list[Facts](), list[Scale]()
    with suppress(DeltaflError):
        scales = problem.scales(single, tested[1][2])
    for name, row, test, more in tested:
        pairs = zip(test.values(), scales, strict=bool(scales))
        normalized = [(score - zero) / unit for score, (zero, unit) in pairs]
        known = asdict(row) if row else {"params": {}}
        rows.append(
            {
                "rule": name,
                **{key: known.get(key) for key in ("params", "scaling_coef", "server_lr")},
                "val": row.value if row and row.val else None,
                "test": test,
                "also": more,
                "mean": fmean(test.values()),
                "normalized": fmean(normalized) if normalized else None,
            }
        )
    return rows


def _describe(
    recipe: SearchRecipe, plan: Plan, problem: Problem, found: SearchResult, rows: Sequence[Facts]
) -> Facts:
    """The result as plain values."""
    tasks = [goal.task for goal in problem.goals]
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
        "single": rows[0]["test"],
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
