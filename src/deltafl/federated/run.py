"""A whole federated run: step 0, rounds, validation, the test at the round that validation chose, and its files."""

import json
import shutil
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deltafl.algebra.tensors import Tensors, device_named
from deltafl.errors import DeltaflError
from deltafl.federated.client import HEAD, Client, LocalTraining, load_params
from deltafl.federated.controls import Controls
from deltafl.federated.ledger import Ledger, setup_bytes
from deltafl.federated.recipe import FederatedRecipe
from deltafl.federated.rounds import OnUpdate, World, in_workers, run_round
from deltafl.federated.saving import save_model, save_update
from deltafl.federated.server import ServerState
from deltafl.federated.setup import MASK_FILE, STATE_FILE, Setting, make_shards, set_up
from deltafl.federated.sharding import describe
from deltafl.federated.state import StateWriter
from deltafl.federated.workers import count_workers
from deltafl.files import atomic_folder, check_output
from deltafl.models import LoadedEncoder
from deltafl.models.flat import FlatModel
from deltafl.models.heads import LinearHead
from deltafl.sparse.masks import model_hash, save_mask
from deltafl.tasks.arrays import Split, Task
from deltafl.training.legacy import predict_correct, run_config
from deltafl.training.recipe import PRECISIONS
from deltafl.training.record import RunRecord, write_json
from deltafl.training.state import require_same_config
from deltafl.usercode import find_callable

OnRound = Callable[[Mapping[str, Any], int], None]
"""Told of each row of the record and of how many rounds there will be."""


@dataclass(frozen=True)
class FederatedRun:
    """What came out: the folder, the result (as in result.json) and every row of the record."""

    out: Path
    result: Mapping[str, Any]
    rows: tuple[Mapping[str, Any], ...]


def federate(
    encoder: LoadedEncoder,
    task: Task,
    recipe: FederatedRecipe,
    out: str | Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    device: str | None = None,
    workers: int | None = None,
    save_client_updates: Collection[int] = (),
    on_round: OnRound = lambda row, total: None,
) -> FederatedRun:
    """Run all rounds and leave in `out` config.yaml, record.jsonl, result.json, mask.safetensors and the best `model/`.

    Validation after every `eval_every` rounds and before the first one; the model of the best one is tested, once.
    Killed at any moment the run goes on with `resume`, on a CPU to the same bits; a finished one is returned as it is.
    An older run in `out` is replaced, with `overwrite`, when head, mask and client of the new one are ready.
    `save_client_updates`: rounds whose clients' models are written to `updates/`, for merge and inspect. `device` None:
    the GPU where there is one. `workers`: processes that train the clients of a round, None for as many as there are
    threads where that is possible; the results are the same bits for any number.

    Raises:
        DeltaflError: a bad recipe, an output in the way, a run of another configuration, no finite update.
    """
    out = Path(out)
    if problems := recipe.problems():
        raise DeltaflError(*problems)
    if not len(task.val) or not len(task.test):
        raise DeltaflError(
            f'task "{task.name}" has {len(task.val)} validation and {len(task.test)} test examples'
        )
    recipe.check_clients()
    where = device_named(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    count = count_workers(workers, recipe, where)
    config = json.loads(json.dumps(run_config(encoder, task, recipe)))
    shards = make_shards(task, recipe)
    record = _record_to_resume(out, config) if resume else None
    if record is not None and (out / "result.json").is_file():
        shutil.rmtree(out / "state", ignore_errors=True)
        return FederatedRun(
            out, json.loads((out / "result.json").read_text()), tuple(record.rows())
        )
    if record is None:
        check_output(out, overwrite=overwrite)
    setting, state = set_up(
        FlatModel(encoder.copy_to(where)), task, recipe, shards, None if record is None else out
    )
    client = make_client(setting)
    if record is None:
        record = _new_record(out, config, setting, overwrite=overwrite)
    world = make_world(setting, state, client, Controls(out / "state" / "controls"))
    with in_workers(world, state, count) as world:
        state = _all_rounds(state, world, setting, record, out, save_client_updates, on_round)
    result = _finish(state, setting, out, record, config)
    return FederatedRun(out, result, tuple(record.rows()))


def head_tensors(head: LinearHead) -> dict[str, Tensor]:
    """Weight and bias of a frozen head; a trained one is among the parameters."""
    return {} if head.parameters() else {"weight": head.weight, "bias": head.bias}


def _record_to_resume(out: Path, config: Mapping[str, Any]) -> RunRecord | None:
    """The record to go on with, whose configuration must be the same; None where nothing was begun."""
    if not (out / "record.jsonl").is_file():
        return None
    record = RunRecord.resume(out)
    require_same_config(record.config(), config, out)
    return record


def _new_record(
    out: Path, config: Mapping[str, Any], setting: Setting, *, overwrite: bool
) -> RunRecord:
    """A folder with an empty record and the mask, in place of an older one, whole or not at all."""
    recipe = setting.recipe
    with atomic_folder(out, overwrite=overwrite) as folder:
        RunRecord.create(folder, config)
        if setting.mask is not None:
            drawn = recipe.mask_strategy if recipe.mask_file is None else None
            about = {"strategy": drawn, "file": recipe.mask_file}
            save_mask(setting.mask, folder / MASK_FILE, model_hash(setting.model), about)
    return RunRecord(out)


def make_client(setting: Setting) -> Client:
    """Who trains: a user's own client or ours."""
    own = setting.recipe.client
    make = LocalTraining if own is None else find_callable(own, "client")
    return make(setting.model, setting.head, setting.recipe)


def make_world(setting: Setting, state: ServerState, client: Client, controls: Controls) -> World:
    """What the rounds need, the training split on the model's device."""
    train, where = setting.task.train, setting.model.device
    split = Split(train.images.to(where), train.labels.to(where))
    trained = frozenset(n for n in state.params if n in setting.model.slices or n.startswith(HEAD))
    return World(setting.recipe, split, setting.shards, client, setting.mask, trained, controls)


def _all_rounds(
    state: ServerState,
    world: World,
    setting: Setting,
    record: RunRecord,
    out: Path,
    saved: Collection[int],
    on_round: OnRound,
) -> ServerState:
    """From `state` to the last round, or to where patience ends; rows after `state` are dropped first."""
    recipe = setting.recipe
    ledger = Ledger(recipe, setting.model, setting.head, setting.mask)
    writer = StateWriter(out / STATE_FILE, head_tensors(setting.head), world.controls, record.sync)
    record.rewind(lambda row: row["round"] <= state.round)
    if state.round == 0:
        state = _validated(state, setting)
        if not record.rows():
            record.append(row := _start_row(state, setting, ledger))
            on_round(row, recipe.num_rounds)
    try:
        while state.round < recipe.num_rounds and not _exhausted(state, recipe):
            state, result = run_round(state, world, _saver(state, setting, out, saved))
            accuracy = None
            if state.round % recipe.eval_every == 0 or state.round == recipe.num_rounds:
                state = _validated(state, setting)
                accuracy = state.accuracy
            row = ledger.row(state.round, result, accuracy)
            record.append(row, sync=False)
            writer.offer(state)
            on_round(row, recipe.num_rounds)
    finally:
        writer.finish()
    return state


def _saver(state: ServerState, setting: Setting, out: Path, saved: Collection[int]) -> OnUpdate:
    """What writes each client's model in the round after `state`, if that is one of `saved`."""
    number = state.round + 1
    if number not in saved:
        return lambda client, update: None
    folder = out / "updates" / f"round-{number:04d}"
    return lambda client, update: save_update(folder, client, update, state.params, setting)


def _start_row(state: ServerState, setting: Setting, ledger: Ledger) -> dict[str, Any]:
    """The row of step 0."""
    shape = describe(setting.shards, setting.task.train.labels.cpu(), len(setting.task.class_names))
    return {
        "event": "start",
        "round": 0,
        "val_score": state.best_score,
        "smallest_client": shape.smallest,
        "largest_client": shape.largest,
        "classes_per_client": [int(shape.classes.min()), int(shape.classes.max())],
        "parameters": ledger.parameters,
        "kept": ledger.kept,
        **setup_bytes(setting),
    }


def _validated(state: ServerState, setting: Setting) -> ServerState:
    """The state after a validation; of equal accuracies the first is the best."""
    accuracy = _accuracy(state.params, setting, setting.task.val)
    if accuracy > state.best_score:
        return replace(
            state,
            accuracy=accuracy,
            best=state.params,
            best_round=state.round,
            best_score=accuracy,
            waited=0,
        )
    return replace(state, accuracy=accuracy, waited=state.waited + 1)


def _accuracy(params: Tensors, setting: Setting, split: Split) -> float:
    """Share of the examples that the model with these parameters, which it keeps, gets right."""
    load_params(setting.model, setting.head, params)
    autocast = PRECISIONS[setting.recipe.mixed_precision]
    return (
        predict_correct(setting.model, setting.head, split, autocast=autocast)
        .double()
        .mean()
        .item()
    )


def _exhausted(state: ServerState, recipe: FederatedRecipe) -> bool:
    return recipe.patience is not None and state.waited >= recipe.patience


def _finish(
    state: ServerState, setting: Setting, out: Path, record: RunRecord, config: Mapping[str, Any]
) -> dict[str, Any]:
    """Test the best model once, write it and the result, drop the state."""
    recipe, task = setting.recipe, setting.task
    rows = [r for r in record.rows() if r["event"] == "round"]
    last = rows[-1] if rows else {}
    result = {
        "title": f"{task.name}: {recipe.num_clients} clients, {recipe.aggregator}",
        "metric": "accuracy",
        "test_score": _accuracy(state.best, setting, task.test),
        "test_examples": len(task.test),
        "val_score": state.best_score,
        "best_round": state.best_round,
        "rounds": state.round,
        "failed_updates": sum(len(r["failed"]) for r in rows),
        **{
            key: last.get(key, 0)
            for key in ("bytes_up_total", "bytes_down_total", "dense_bytes_up_total")
        },
        **setup_bytes(setting),
        **{key: sum(r[key] for r in rows) for key in ("client_seconds", "server_seconds")},
        "config": dict(config),
    }
    save_model(out / "model", setting, config, steps=sum(r["num_steps"] for r in rows))
    write_json(out / "result.json", result)
    shutil.rmtree(out / "state", ignore_errors=True)
    return result
