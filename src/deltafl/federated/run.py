"""A whole federated run: step 0, rounds, validation, the test at the round that validation chose, and its files."""

import json
import shutil
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deltafl.datasets.task import Split, Task
from deltafl.errors import DeltaflError
from deltafl.federated.client import HEAD, Client, LocalTraining, load_params, moving
from deltafl.federated.controls import Controls
from deltafl.federated.ledger import Ledger
from deltafl.federated.recipe import FederatedRecipe
from deltafl.federated.rounds import World, run_round
from deltafl.federated.saving import save_model, save_update
from deltafl.federated.server import ServerState
from deltafl.federated.setup import make_head, make_mask, make_shards
from deltafl.federated.stacked import StackedTraining
from deltafl.federated.state import StateWriter, decode
from deltafl.files import check_output
from deltafl.finetuning.recipe import PRECISIONS
from deltafl.finetuning.state import require_same_config, run_config
from deltafl.models import LoadedEncoder
from deltafl.models.flat import FlatModel
from deltafl.models.heads import LinearHead
from deltafl.record import RunRecord, write_json
from deltafl.sharding import describe
from deltafl.sparse.masks import Mask, load_mask, model_hash, save_mask
from deltafl.tensors import device_named
from deltafl.training import predict_correct
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
    save_client_updates: Collection[int] = (),
    on_round: OnRound = lambda row, total: None,
) -> FederatedRun:
    """Run all rounds and leave in `out` config.yaml, record.jsonl, result.json, head, mask and the best `model/`.

    Validation after every `eval_every` rounds and before the first one; the model of the best one is tested, once.
    Killed at any moment the run goes on with `resume`, on a CPU to the same bits; a finished one is returned as it is.
    `save_client_updates`: rounds whose clients' models are written to `updates/`, for merge and inspect. `device` None:
    the GPU where there is one.

    Raises:
        DeltaflError: a bad recipe, an output in the way, a run of another configuration, no finite update.
    """
    out = Path(out)
    if problems := recipe.problems():
        raise DeltaflError(*problems)
    if not len(task.val) or not len(task.test):
        raise DeltaflError(f'task "{task.name}" has {len(task.val)} validation and {len(task.test)} test examples')
    where = device_named(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    config = json.loads(json.dumps(run_config(encoder, task, recipe, None)))
    shards = make_shards(task, recipe)
    record = _open_record(out, config, resume=resume, overwrite=overwrite)
    if (out / "result.json").is_file():
        return FederatedRun(out, json.loads((out / "result.json").read_text()), tuple(record.rows()))
    model = FlatModel(encoder.copy_to(where))
    state, head, mask = _start(model, task, recipe, shards, out)
    controls = Controls(out / "state" / "controls")
    writer = StateWriter(out / "state" / "state.safetensors", head_tensors(head), controls)
    split = Split(task.train.images.to(where), task.train.labels.to(where))
    client = _client(model, head, recipe)
    trained = frozenset(n for n in state.params if n in model.slices or n.startswith(HEAD))
    world = World(recipe, split, shards, client, mask, trained, controls)
    record.rewind(lambda row: row["round"] <= state.round)
    ledger = Ledger(recipe, model, head, mask)
    if state.round == 0 and not record.rows():
        state = _validated(state, model, head, task, recipe)
        shape = describe(shards, task.train.labels.cpu(), len(task.class_names))
        row = {"event": "start", "round": 0, "val_accuracy": state.best_accuracy, "smallest_client": shape.smallest,
               "largest_client": shape.largest, "classes_per_client": [int(shape.classes.min()),
               int(shape.classes.max())], "parameters": ledger.parameters, "kept": ledger.kept}  # fmt: skip
        record.append(row)
        on_round(row, recipe.num_rounds)
    elif state.round == 0:
        state = _validated(state, model, head, task, recipe)
    try:
        while state.round < recipe.num_rounds and not _exhausted(state, recipe):
            saving = state.round + 1 in save_client_updates
            base, number = state.params, state.round + 1

            def keep(k: int, update: Any, base: Mapping[str, Tensor] = base, number: int = number) -> None:
                save_update(out / "updates" / f"round-{number:04d}", k, update, base, model, head, task, recipe)

            state, result = run_round(state, world, keep if saving else lambda k, update: None)
            accuracy = None
            if state.round % recipe.eval_every == 0 or state.round == recipe.num_rounds:
                state = _validated(state, model, head, task, recipe)
                accuracy = state.accuracy
            row = ledger.row(state.round, result, accuracy)
            record.append(row, sync=False)
            writer.offer(state)
            on_round(row, recipe.num_rounds)
    finally:
        writer.finish()
    result = _finish(state, model, head, task, recipe, out, record, config)
    return FederatedRun(out, result, tuple(record.rows()))


def head_tensors(head: LinearHead) -> dict[str, Tensor]:
    """Weight and bias of a frozen head; a trained one is among the parameters."""
    return {} if head.parameters() else {"weight": head.weight, "bias": head.bias}


def _open_record(out: Path, config: Mapping[str, Any], *, resume: bool, overwrite: bool) -> RunRecord:
    """A new record, or the one to go on with, whose configuration must be the same."""
    if resume and (out / "record.jsonl").is_file():
        record = RunRecord.resume(out)
        require_same_config(record.config(), config, out)
        return record
    check_output(out, overwrite=overwrite)
    if out.exists():
        shutil.rmtree(out)
    return RunRecord.create(out, config)


def _start(
    model: FlatModel, task: Task, recipe: FederatedRecipe, shards: tuple[Tensor, ...], out: Path
) -> tuple[ServerState, LinearHead, Mask | None]:
    """Head and mask, and the state to begin with: the last one that was written, or the model as it is."""
    file, mask_file = out / "state" / "state.safetensors", out / "mask.safetensors"
    if file.is_file():  # the head must exist before the state that holds a trained one can be read
        head = _head_like(model, task, recipe)
        state, tensors = decode(file, _initial(model, head, recipe))
        head = replace(head, **{n: t.to(model.device) for n, t in tensors.items()})
        return state, head, load_mask(mask_file, model_hash(model)) if recipe.sparse else None
    head = make_head(model, task, shards, recipe)
    mask = make_mask(model, head, task, shards, recipe)
    if mask is not None:
        save_mask(mask, mask_file, model_hash(model), {"strategy": recipe.mask_strategy, "file": recipe.mask_file})
    return _initial(model, head, recipe), head, mask


def _head_like(model: FlatModel, task: Task, recipe: FederatedRecipe) -> LinearHead:
    count = len(task.class_names)
    weight = torch.zeros(count, model.encoder.feature_dim, device=model.device)
    head = LinearHead(weight, torch.zeros(count, device=model.device), task.class_names)
    return head.trainable() if recipe.train_head else head


def _initial(model: FlatModel, head: LinearHead, recipe: FederatedRecipe) -> ServerState:
    params = {n: t.detach().clone() for n, t in moving(model, head).items()}
    control = None
    if recipe.local_algorithm == "scaffold":
        control = torch.zeros(model.flat.numel() + sum(p.numel() for p in head.parameters()), device=model.device)
    return ServerState(0, params, control=control)


def _client(model: FlatModel, head: LinearHead, recipe: FederatedRecipe) -> Client:
    if recipe.client is not None and recipe.engine == "sequential":
        return find_callable(recipe.client, "client")(model, head, recipe)
    return StackedTraining(model, head, recipe) if recipe.engine == "vmap" else LocalTraining(model, head, recipe)


def _validated(
    state: ServerState, model: FlatModel, head: LinearHead, task: Task, recipe: FederatedRecipe
) -> ServerState:
    """The state after a validation; of equal accuracies the first is the best."""
    load_params(model, head, state.params)
    correct = predict_correct(model, head, task.val, autocast=PRECISIONS[recipe.mixed_precision])
    accuracy = correct.double().mean().item()
    if accuracy > state.best_accuracy:
        return replace(
            state, accuracy=accuracy, best=state.params, best_round=state.round, best_accuracy=accuracy, waited=0
        )
    return replace(state, accuracy=accuracy, waited=state.waited + 1)


def _exhausted(state: ServerState, recipe: FederatedRecipe) -> bool:
    return recipe.patience is not None and state.waited >= recipe.patience


def _finish(
    state: ServerState,
    model: FlatModel,
    head: LinearHead,
    task: Task,
    recipe: FederatedRecipe,
    out: Path,
    record: RunRecord,
    config: Mapping[str, Any],
) -> dict[str, Any]:
    """Test the best model once, write it and the result, drop the state."""
    load_params(model, head, state.best)
    correct = predict_correct(model, head, task.test, autocast=PRECISIONS[recipe.mixed_precision])
    rows = [r for r in record.rows() if r["event"] == "round"]
    last = rows[-1] if rows else {}
    result = {
        "title": f"{task.name}: {recipe.num_clients} clients, {recipe.aggregator}",
        "test_accuracy": correct.double().mean().item(),
        "test_examples": len(correct),
        "val_accuracy": state.best_accuracy,
        "best_round": state.best_round,
        "rounds": state.round,
        "failed_updates": sum(len(r["failed"]) for r in rows),
        **{key: last.get(key, 0) for key in ("bytes_up_total", "bytes_down_total", "dense_bytes_up_total")},
        **{key: sum(r[key] for r in rows) for key in ("client_seconds", "server_seconds")},
        "config": dict(config),
    }
    save_model(out / "model", model, head, task, recipe, config, steps=sum(r["num_steps"] for r in rows))
    write_json(out / "result.json", result)
    shutil.rmtree(out / "state", ignore_errors=True)
    return result
