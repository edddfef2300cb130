"""A whole federated run: step 0, rounds, the test at the round that validation chose, and its
files.
"""

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from deltafl.algebra.tensors import device_named
from deltafl.errors import DeltaflError
from deltafl.federated.callbacks import (
    Bytes,
    Callback,
    ClientModels,
    Record,
    Row,
    Shards,
    StateFile,
    Validation,
    score_of,
    setup_bytes,
)
from deltafl.federated.recipe import FederatedRecipe
from deltafl.federated.rounds import Federation, Workers, count_workers, run_round
from deltafl.federated.saving import save_net
from deltafl.federated.server import ServerState
from deltafl.federated.setup import begin, initial_state, make_shards, new_record
from deltafl.federated.state import Best, StateWriter, read_state
from deltafl.files import check_output
from deltafl.models.net import Net
from deltafl.progress import OnProgress, ignore
from deltafl.tasks.task import Task
from deltafl.training.record import FinishedRun, RunRecord, write_json
from deltafl.training.state import require_same_config, run_config

STATE_FILE = "state/state.safetensors"


def federate(
    net: Net,
    task: Task,
    recipe: FederatedRecipe,
    *,
    resume: bool = False,
    on_progress: OnProgress = ignore,
    callbacks: Sequence[Callback] = (),
) -> FinishedRun:
    """Run all rounds and leave in `recipe.out` config.yaml, record.jsonl, result.json,
    mask.safetensors and the best `model/`.

    net, task: those that the recipe names, loaded. Validation after every `eval_every` rounds and
    before the first one; the model of the best one is tested, once. Killed at any moment the run
    goes on with `resume`, on a CPU to the same bits; a finished one is returned as it is. An older
    run in the folder is replaced, with `overwrite`, when head, mask and client of the new one are
    ready. `callbacks` are called after our own. The results are the same bits for any number of
    workers.

    Raises:
        DeltaflError: an output in the way, a run of another configuration, no finite update.
    """
    if recipe.out is None:
        raise DeltaflError("no output; name a folder with --out")
    out = Path(recipe.out)
    if not task.size("val") or not task.size("test"):
        raise DeltaflError(
            f'task "{task.name}" has {task.size("val")} validation and {task.size("test")} test '
            "examples"
        )
    recipe.check_rule()
    device = device_named(recipe.device)
    count = count_workers(recipe, device)
    config = json.loads(json.dumps(run_config(net, task, recipe)))
    shards = make_shards(task, recipe)
    begun = resume and (out / "record.jsonl").is_file()
    record = RunRecord.resume(out) if begun else RunRecord(out)
    if begun:
        require_same_config(record.config(), config, out)
        if (out / "result.json").is_file():
            shutil.rmtree(out / "state", ignore_errors=True)
            return _found(out, record)
    else:
        check_output(out, overwrite=recipe.overwrite)
    federation = begin(net.copy_to(device), task.to(device), recipe, shards, begun)
    if not begun:
        new_record(federation, config)
    state = initial_state(federation)
    best = Best(state.params, 0, -math.inf)
    if (out / STATE_FILE).is_file():
        state, best = read_state(out / STATE_FILE, state)
    with Workers(federation, state, count) as workers:
        done, best = _all_rounds(state, best, federation, workers, record, on_progress, callbacks)
    _finish(done, best, federation, record, config)
    return _found(out, record)


def _found(out: Path, record: RunRecord) -> FinishedRun:
    return FinishedRun(out, json.loads((out / "result.json").read_text()), tuple(record.rows()))


def _all_rounds(
    state: ServerState,
    best: Best,
    federation: Federation,
    workers: Workers,
    record: RunRecord,
    on_progress: OnProgress,
    own: Sequence[Callback],
) -> tuple[ServerState, Best]:
    """From `state` to the last round, or to where patience ends; rows after `state` are dropped
    first.
    """
    recipe, validation = federation.recipe, Validation(federation, best)
    writer = StateWriter(record.folder / STATE_FILE, record.sync, federation.controls.prune)
    callbacks: list[Callback] = [
        validation,
        Shards(federation),
        Bytes(federation),
        *own,
        Record(record, recipe.num_rounds, workers, on_progress),
        StateFile(writer, validation),
        ClientModels(federation, record.folder),
    ]
    record.rewind(lambda row: row["round"] <= state.round > 0)
    if not state.round:
        row: Row = {"event": "start", "round": 0}
        for callback in callbacks:
            callback.begin(state, row)
    try:
        while state.round < recipe.num_rounds and not validation.is_exhausted:
            state, result = run_round(state, federation, workers)
            row = {"event": "round", "round": state.round, **result.numbers}
            for callback in callbacks:
                callback.after(state, result, row)
    finally:
        for callback in callbacks:
            callback.end()
    return state, validation.best


def _finish(
    state: ServerState,
    best: Best,
    federation: Federation,
    record: RunRecord,
    config: Mapping[str, Any],
) -> None:
    """Test the best model once, write it and the result, drop the state."""
    recipe, task, out = federation.recipe, federation.task, record.folder
    rows = [row for row in record.rows() if row["event"] == "round"]
    totals = ("bytes_up_total", "bytes_down_total", "dense_bytes_up_total")
    result = {
        "title": f"{task.name}: {recipe.sharding.num_clients} clients, {recipe.server.aggregator}",
        "metric": task.metric,
        "ratio_scaled": task.ratio_scaled,
        "test_score": score_of(federation, best.params, "test"),
        "test_examples": task.size("test"),
        "val_score": best.score,
        "best_round": best.round,
        "rounds": state.round,
        "failed_updates": sum(len(row["failed"]) for row in rows),
        **{key: rows[-1][key] if rows else 0 for key in totals},
        **setup_bytes(federation),
        **{key: sum(row[key] for row in rows) for key in ("client_seconds", "server_seconds")},
        "config": dict(config),
    }
    facts = {
        "base": {"id": federation.net.origin, "fingerprint": config["base_fingerprint"]},
        "task": task.name,
        "num_steps": sum(row["num_steps"] for row in rows),
        "num_examples": task.size("train"),
        "lr": recipe.local.lr,
        "momentum": recipe.local.momentum,
        "seed": recipe.seed,
        "federated": recipe.content(),
    }
    save_net(out / "model", federation.net, facts)
    write_json(out / "result.json", result)
    shutil.rmtree(out / "state", ignore_errors=True)
