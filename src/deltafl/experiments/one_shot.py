"""One-shot federated learning: search method and coefficients over saved fine-tunes, test once, write the winner."""

import json
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from deltafl.algebra.aggregate import as_weights
from deltafl.errors import DeltaflError
from deltafl.merge.inputs import Opened, open_updates
from deltafl.merge.plan import MergeSpec, Model, Plan, plan_merge, read_training
from deltafl.merge.run import run_merge
from deltafl.merge.search import (
    LAMBDAS,
    Goal,
    Metric,
    Problem,
    Row,
    SearchResult,
    check_methods,
    check_strategy,
    curves,
    grid_of,
    search,
    test_once,
    test_singles,
)
from deltafl.models import LoadedEncoder, load_encoder
from deltafl.models.flat import FlatModel
from deltafl.models.heads import HEAD_FILE, ZERO_SHOT, check_head, load_head
from deltafl.rules.rule import Source, build_rule
from deltafl.tasks.arrays import Task, load_arrays
from deltafl.training.evaluation import zero_shot_for
from deltafl.training.legacy import Accuracy
from deltafl.version import __version__

SINGLE, BASE = "single-task models", "base (unmerged)"


@dataclass(frozen=True)
class TaskModel:
    """A fine-tuned model, the data it is judged on (or a spec for `load_task`), and its head (None: in its folder)."""

    model: Model
    data: str | Task
    head: str | None = None


@dataclass(frozen=True)
class SearchSpec:
    """Everything that decides a search. `merge`: base, scope, weights and the like; its method is what wins.

    methods: (name, parameters; a list is a grid). memory: bytes up to which checkpoints are held rather than read
    again; a race holds as much again of updates. seed: of the validation splits, None: the one that each model was
    trained with; and of a race's subsets, None: 0. strategy, confidence, each_method: see `merge.search`.
    data_dir: where tasks by name are. templates: a file of prompts for zero-shot heads. fixed: (name,
    candidate) that is tested as it is, beside what the search chooses.
    """

    merge: MergeSpec
    models: tuple[TaskModel, ...]
    methods: tuple[tuple[str, Mapping[str, Any]], ...]
    lambdas: tuple[float, ...] = LAMBDAS
    native_scale: bool = False
    metric: Metric = "normalized"
    strategy: str = "exhaustive"
    confidence: float = 0.95
    each_method: bool = False
    memory: int = 8_000_000_000
    batch_size: int = 256
    seed: int | None = None
    data_dir: str | None = None
    templates: str | None = None
    fixed: tuple[tuple[str, Row], ...] = ()


def run_search(
    spec: SearchSpec,
    out: str | Path | None,
    *,
    scores: Path | None = None,
    overwrite: bool = False,
    on_row: Callable[[Row, int], None],
) -> dict[str, Any]:
    """Search, test once, merge the winner into OUT (if given); returns the result that report and tables are made of.

    Where no candidate is better than the base, OUT is not written, and `best` in the result has method "base".
    scores: a file for the validation scores of every example (see `save_scores`).
    on_row: told of every row, and of how many there will be at most. Raises DeltaflError before any work if names,
    heads, tasks or methods do not fit.
    """
    started = time.perf_counter()
    plan = plan_merge(
        replace(
            spec.merge,
            models=tuple(m.model for m in spec.models),
            method="task_arithmetic",
            params={},
        )
    )
    check_strategy(spec.strategy, spec.confidence)
    check_methods(spec.methods, spec.lambdas, plan.sources)
    for _, row in spec.fixed:
        check_methods([(row.method, row.params)], [row.scaling_coef], plan.sources)
    encoder = load_encoder(spec.merge.base)
    tasks = [_task(entry, plan, encoder, spec) for entry in spec.models]
    if len({t.name for t in tasks}) < len(tasks):
        raise DeltaflError("two models have one task; a search wants one model for each task")
    with open_updates(plan, spec.memory) as opened:
        problem = _problem(spec, plan, opened, encoder, tasks)
        found = search(
            problem,
            spec.methods,
            lambdas=spec.lambdas,
            native_scale=spec.native_scale,
            metric=spec.metric,
            strategy=spec.strategy,
            confidence=spec.confidence,
            each_method=spec.each_method,
            seed=spec.seed or 0,
            memory=spec.memory,
            on_row=lambda row: on_row(row, most_rows(spec)),
        )
        result = describe(spec, plan, problem, found)
    if scores is not None:
        save_scores(found, scores)
    if out is not None and found.best.method != "base":
        winner = replace(
            plan.spec,
            method=found.best.method,
            params=dict(found.best.params),
            scaling_coef=found.best.scaling_coef,
        )
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


def most_rows(spec: SearchSpec) -> int:
    """Rows of the whole grid, for a progress bar."""
    return 1 + len(spec.lambdas) * sum(len(grid_of(m, p, (0.0, 1.0))) for m, p in spec.methods)


def _task(entry: TaskModel, plan: Plan, encoder: LoadedEncoder, spec: SearchSpec) -> Task:
    """The task of a model, with the validation split that its training held out, unless the spec says otherwise."""
    if isinstance(entry.data, Task):
        return entry.data
    given, seed = encoder.input, spec.seed
    if seed is None:
        seed = int(read_training(plan.layouts[entry.model.name]).get("seed") or 0)
    return load_arrays(
        entry.data,
        image_size=given.image_size,
        channels=given.channels,
        seed=seed,
        data_dir=spec.data_dir,
    )


def _problem(
    spec: SearchSpec, plan: Plan, opened: Opened, encoder: LoadedEncoder, tasks: Sequence[Task]
) -> Problem:
    goals, problems = [], []
    for entry, task in zip(spec.models, tasks, strict=True):
        path = Path(entry.head) if entry.head else plan.layouts[entry.model.name].folder / HEAD_FILE
        try:
            head = (
                zero_shot_for(encoder, task, spec.templates)
                if entry.head == ZERO_SHOT
                else load_head(path)
            )
            check_head(head, encoder.feature_dim, task.class_names, str(path))
        except DeltaflError as error:
            problems.extend(error.problems)
            continue
        val, test = (Accuracy(split, head, spec.batch_size) for split in (task.val, task.test))
        goals.append(Goal(task.name, val, test, opened.tuned[entry.model.name]))
    if problems:
        raise DeltaflError(*problems)
    device = spec.merge.device
    model = FlatModel(encoder.copy_to(device))
    return Problem(model, opened.base, opened.updates, goals, opened.weights, plan.threads)


def describe(spec: SearchSpec, plan: Plan, problem: Problem, found: SearchResult) -> dict[str, Any]:
    """The result as plain values; this is where the test split is looked at, once for each reported row."""
    single = test_singles(problem)
    base = test_once(problem, found.base, None)
    rows = [_row(SINGLE, None, single, single), _row(BASE, found.base, base, single)]
    for method, best in found.best_of.items():
        test = test_once(problem, best, build_rule(method, best.params))
        rows.append(_row(method, best, test, single))
    for name, row in spec.fixed:
        test = test_once(problem, row, build_rule(row.method, row.params))
        total = sum(map(abs, as_weights(problem.weights, len(problem.updates)).default))
        rows.append(
            {
                **_row(name, replace(row, server_lr=total * row.scaling_coef), test, single),
                "val": None,
            }
        )
    norms = found.norms
    lengths = found.gram.diagonal().sqrt().clamp_min(1e-30)
    return {
        "title": f"{len(problem.goals)} tasks, one model",
        "seed": spec.seed,
        "tasks": [g.name for g in problem.goals],
        "metric": "accuracy",
        "criterion": spec.metric,
        "strategy": spec.strategy,
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
