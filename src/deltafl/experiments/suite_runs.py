"""Run the cells of suites, each finished run kept by the content of its configuration, and sum them up."""

import hashlib
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deltafl.algebra.tensors import device_named
from deltafl.errors import DeltaflError
from deltafl.experiments.federated_suites import Cell
from deltafl.federated import federate
from deltafl.federated.recipe import FederatedRecipe
from deltafl.federated.sharding import ShardingRecipe, shard
from deltafl.models.net import Net
from deltafl.seeding import keyed_generator
from deltafl.tasks.task import Task
from deltafl.training.record import read_rows
from deltafl.training.state import run_config
from deltafl.training.tensorboard import write_rows
from deltafl.usercode import find_callable


@dataclass(frozen=True)
class Bench:
    """What every run of a suite shares: the model, the task of a seed, where runs are kept, how many of each cell.

    metrics: a folder for event files, SUITE/CELL/seed-N; None writes none.
    """

    net: Net
    task: Callable[[int], Task]
    folder: Path
    num_runs: int
    metrics: Path | None = None


OnRun = Callable[[str, int, int], None]
"""Told (suite, runs done, runs in all)."""


def preflight(suites: Mapping[str, Sequence[Cell]], task: Task, device: str | None) -> None:
    """Raise DeltaflError with what some run could only say when its turn comes: no such GPU or client, no such shards.

    Shards are made for the seed of each recipe, once for all cells that share them.
    """
    if device is not None:
        device_named(device)
    shardings: dict[tuple[ShardingRecipe, int], str] = {}
    for name, cells in suites.items():
        for cell in cells:
            r = cell.recipe
            if r.local.client is not None:
                find_callable(r.local.client, "client")
            shardings.setdefault((r.sharding, r.seed), f"{name}, {cell.name}")
    problems = []
    for (sharding, seed), where in shardings.items():
        try:
            shard(task.groups("train"), sharding, keyed_generator(seed, "shards"))
        except DeltaflError as error:
            problems += [f"{where}: {problem}" for problem in error.problems]
    if problems:
        raise DeltaflError(*problems)


def run_suite(
    name: str, cells: Sequence[Cell], bench: Bench, on_run: OnRun
) -> list[dict[str, Any]]:
    """One summary per cell: labels, mean and spread of test accuracy over seeds, bytes, and the mean curve.

    A run whose configuration was run before, in any suite of the same folder, is read and not repeated; a killed one
    goes on. A cell that cannot be run (krum with too few clients) says why, and the others go on.
    """
    done, total = 0, len(cells) * bench.num_runs
    summaries = []
    for cell in cells:
        runs: list[tuple[Mapping[str, Any], Sequence[Mapping[str, Any]]]] = []
        failed = None
        for seed in range(cell.recipe.seed, cell.recipe.seed + bench.num_runs):
            try:
                runs.append(_one(cell.recipe.replace(seed=seed), bench))
                if bench.metrics is not None:
                    write_rows(runs[-1][1], bench.metrics / name / cell.name / f"seed-{seed}")
            except DeltaflError as error:
                failed = str(error)
            done += 1
            on_run(name, done, total)
        summaries.append(summarise(cell, runs, failed))
    return summaries


def _one(
    recipe: FederatedRecipe, bench: Bench
) -> tuple[Mapping[str, Any], Sequence[Mapping[str, Any]]]:
    """Result and rows of one run, from disk where it was finished before."""
    task = bench.task(recipe.seed)
    config = run_config(bench.net, task, recipe)
    key = hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:16]
    folder = bench.folder / key
    if (folder / "result.json").is_file():
        return json.loads((folder / "result.json").read_text()), read_rows(folder / "record.jsonl")
    run = federate(bench.net, task, recipe.replace(out=str(folder), overwrite=True), resume=True)
    return run.result, run.rows


def summarise(
    cell: Cell,
    runs: Sequence[tuple[Mapping[str, Any], Sequence[Mapping[str, Any]]]],
    failed: str | None,
) -> dict[str, Any]:
    """Plain values of one cell; spread is the sample standard deviation over seeds, None for one run."""
    if not runs:
        return {"labels": dict(cell.labels), "name": cell.name, "runs": 0, "failed": failed}
    results = [result for result, _ in runs]
    tests = [result["test_score"] for result in results]
    return {
        "labels": dict(cell.labels),
        "name": cell.name,
        "runs": len(runs),
        "failed": failed,
        "test": statistics.mean(tests),
        "spread": statistics.stdev(tests) if len(tests) > 1 else None,
        "val": statistics.mean(result["val_score"] for result in results),
        "best_round": statistics.mean(result["best_round"] for result in results),
        "megabytes_up": statistics.mean(result["bytes_up_total"] for result in results) / 1e6,
        "seconds": sum(result["client_seconds"] + result["server_seconds"] for result in results),
        "left_out": sum(result["failed_updates"] for result in results),
        "by_round": mean_curve([rows for _, rows in runs], "round"),
        "by_bytes": mean_curve([rows for _, rows in runs], "bytes_up_total"),
    }


def mean_curve(runs: Sequence[Sequence[Mapping[str, Any]]], key: str) -> list[tuple[float, float]]:
    """(mean of `key`, mean validation accuracy) over runs, at the rounds that every run validated."""
    by_round = [
        {row["round"]: row for row in rows if row["val_score"] is not None} for rows in runs
    ]
    shared = sorted(set.intersection(*(set(rows) for rows in by_round)))
    return [
        (
            statistics.mean(rows[number].get(key, 0) for rows in by_round),
            statistics.mean(rows[number]["val_score"] for rows in by_round),
        )
        for number in shared
    ]
