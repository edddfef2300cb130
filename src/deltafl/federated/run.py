"""A whole federated run: step 0, rounds, the test at the round that validation chose, and its
files.
"""

import resource
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from deltafl.algebra.deltas import Difference, Update
from deltafl.algebra.tensors import device_named
from deltafl.checkpoints.layout import fingerprint, read_layout
from deltafl.federated.client import load_state, state_of
from deltafl.federated.recipe import FederatedRecipe
from deltafl.federated.rounds import Workers, count_workers, run_round
from deltafl.federated.server import ServerState
from deltafl.federated.setup import (
    Federation,
    begin,
    calibration_clients,
    make_shards,
    new_record,
)
from deltafl.models.net import Net
from deltafl.progress import OnProgress, Progress, ignore
from deltafl.sparse.eligible import eligible
from deltafl.sparse.masks import load_mask
from deltafl.tasks.task import Split, Task, require_examples
from deltafl.training.finetune import write_model
from deltafl.training.loop import Best
from deltafl.training.record import (
    FinishedRun,
    Row,
    RunRecord,
    read_rows,
    read_state,
    run_config,
    write_json,
    write_state,
)
from deltafl.training.step import scores
from deltafl.usercode import find_callable

PAUSE = 100


class StateFile:
    """What a killed run goes on from. A state is not due before `PAUSE` times as long as the last
    one took, so that writing takes 1 % of the time; a resumed run repeats the rounds since then, to
    the same bits.
    """

    def __init__(self, file: Path, config: Row) -> None:
        self.file, self.config, self._next = file, config, 0.0

    def is_due(self) -> bool:
        """Whether it is time to write."""
        return time.monotonic() >= self._next

    def write(self, state: ServerState, best: Best) -> None:
        """Replace the file. What it counts on must be on the disk earlier."""
        started = time.monotonic()
        write_state(self.file, self.config, {"server": vars(state), "best": vars(best)})
        done = time.monotonic()
        self._next = done + PAUSE * (done - started)


class Traffic:
    """Bytes of each round and in all, with the mask and as if there were none; `done` rounds are
    over.

    A client gets and sends 4 bytes for each kept coordinate and each value of float buffers;
    scaffold doubles the trained ones. The mask's bits go to a client once. The pre-trained model
    is at the clients already.

    first: of step 0, of all clients together; no round counts it. Up: what fitting the head needs
    (`Net.head_bytes`); of each client of a calibration a float32 Fisher sum for each eligible
    coordinate. Down: a frozen head to every client once, a trained one to the clients of a
    calibration, since rounds count it.
    """

    def __init__(self, federation: Federation, done: int) -> None:
        net, recipe, kept = federation.net, federation.recipe, federation.kept
        trained = net.flat.numel()
        extra = sum(t.numel() for t in net.state().values()) - trained
        times = 1 + recipe.local.algorithm.has_control
        up, head = net.head_bytes(recipe.head, federation.shards)
        asked = sum(map(len, calibration_clients(recipe)))
        scored = sum(int(m.sum()) for m in eligible(net).values())
        self.first: Row = {
            "parameters": trained,
            "kept": kept,
            "setup_bytes_up": up + asked * 4 * scored,
            "setup_bytes_down": head
            * (asked if recipe.head.train_head else recipe.sharding.num_clients),
        }
        self._payload, self._dense = (4 * (times * n + extra) for n in (kept, trained))
        self._mask = 0 if federation.mask is None else -(-trained // 8)
        self._seen = {k for n in range(done) for k in recipe.clients_in(n + 1)}

    def after(self, number: int, clients: Sequence[int]) -> Row:
        """Of a round in which these clients took part."""
        before, up = len(self._seen), self._payload * len(clients)
        self._seen.update(clients)
        return {
            "bytes_up": up,
            "bytes_down": up + self._mask * (len(self._seen) - before),
            "bytes_up_total": up * number,
            "bytes_down_total": up * number + self._mask * len(self._seen),
            "dense_bytes_up_total": self._dense * len(clients) * number,
        }


def federate(
    net: Net,
    task: Task,
    recipe: FederatedRecipe,
    *,
    resume: bool = False,
    on_progress: OnProgress = ignore,
) -> FinishedRun:
    """Run all rounds and leave in `recipe.out` config.yaml, record.jsonl, result.json,
    mask.safetensors and the best `model/`.

    net, task: those that the recipe names, loaded. Validation after every `eval_every` rounds and
    before the first one; the model of the best one is tested, once. Killed at any moment the run
    goes on with `resume`, on a CPU to the same bits; a finished one is returned as it is. An older
    run in the folder is replaced, with `overwrite`, when head, mask and client of the new one are
    ready. The results are the same bits for any number of workers.

    Raises:
        DeltaflError: an output in the way, a run of another configuration, no finite update.
    """
    record = RunRecord(recipe.output)
    device, count, shards = check_run(task, recipe)
    config = run_config(net, task, recipe)
    begun = record.begun(config, resume=resume, overwrite=recipe.overwrite)
    if begun and record.is_finished:
        return record.finished()
    federation = begin(net.copy_to(device), task.to(device), recipe, shards, begun)
    if not begun:
        new_record(federation, config)
    state = federation.initial_state()
    best, kept = Best(tensors=state.params), StateFile(record.folder / "state" / "state.pt", config)
    if (held := read_state(kept.file, config, device)) is not None:
        state, best = ServerState(**held["server"]), Best(**held["best"])
    record.rewind("round", state.round)
    with Workers(federation, state, count) as workers:
        for now, row in _rounds(state, best, federation, workers):
            due = now.round > 0 and kept.is_due()
            record.append(row, sync=due)
            if due:
                kept.write(now, best)
                federation.controls.prune(now.round + 1, recipe.sharding.num_clients)
            score = row["val_score"]
            seen = {} if score is None else {"validation": score}
            on_progress(Progress("rounds", now.round, recipe.num_rounds, seen))
    return _finished(best, federation, record, config)


def check_run(task: Task, recipe: FederatedRecipe) -> tuple[torch.device, int, Sequence[Tensor]]:
    """Device, number of workers and shards of a run.

    Raises:
        DeltaflError: what can be known to go wrong before the model is touched.
    """
    require_examples(task, "train", "val", "test")
    recipe.check_rule()
    if recipe.local.client is not None:
        find_callable(recipe.local.client, "client")
    if recipe.sparse.mask_file is not None:
        load_mask(recipe.sparse.mask_file, None)
    device = device_named(recipe.device)
    return device, count_workers(recipe, device), make_shards(task, recipe)


def _rounds(
    state: ServerState, best: Best, federation: Federation, workers: Workers
) -> Iterator[tuple[ServerState, Row]]:
    """From `state` to the last round, or to where patience ends: the state and the row of each."""
    recipe, traffic = federation.recipe, Traffic(federation, state.round)

    def judge(state: ServerState) -> float:
        score = score_of(federation, state.params, "val")
        best.see(score, state.round, lambda: state.params)
        return score

    if not state.round:
        yield state, {"event": "start", "round": 0, "val_score": judge(state), **traffic.first}
    while state.round < recipe.num_rounds and not best.exhausts(recipe.patience):
        base, (state, result) = state.params, run_round(state, federation, workers)
        number = state.round
        due = number % recipe.eval_every == 0 or number == recipe.num_rounds
        row: Row = {"event": "round", "round": number, **result.numbers}
        row["val_score"] = judge(state) if due else None
        row |= traffic.after(number, row["clients"])
        row["peak_memory_bytes"] = peak_memory() + sum(workers.memory.values())
        if {"all", str(number)} & set(map(str, recipe.save_client_updates)):
            folder = recipe.output / "updates" / f"round-{number:04d}"
            for client, update in result.updates.items():
                save_update(folder, client, update, base, federation)
        yield state, row


def _finished(best: Best, federation: Federation, record: RunRecord, config: Row) -> FinishedRun:
    """Test the best model once, write it and the result, drop the state."""
    recipe, task, out = federation.recipe, federation.task, record.folder
    first, *rows = read_rows(record.path)
    totals = ("bytes_up_total", "bytes_down_total", "dense_bytes_up_total")
    result = {
        "title": f"{task.name}: {recipe.sharding.num_clients} clients, {recipe.server.aggregator}",
        "metric": task.metric,
        "ratio_scaled": task.ratio_scaled,
        "test_score": score_of(federation, best.tensors, "test"),
        "test_examples": task.size("test"),
        "val_score": best.score,
        "best_round": best.after,
        "rounds": len(rows),
        "failed_updates": sum(len(row["failed"]) for row in rows),
        **{key: sum(row[key] for row in rows[-1:]) for key in totals},
        **{key: first[key] for key in ("setup_bytes_up", "setup_bytes_down")},
        **{key: sum(row[key] for row in rows) for key in ("client_seconds", "server_seconds")},
        "config": config,
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
    write_model(out / "model", federation.net, facts)
    write_json(out / "result.json", result)
    return record.finished()


def score_of(federation: Federation, params: Mapping[str, Tensor], split: Split) -> float:
    """Mean score over examples of the model with these parameters, which the working net keeps."""
    net = federation.net
    load_state(state_of(net), params)
    found = scores(net, federation.task, split, autocast=federation.recipe.autocast)
    return found.double().mean().item()


def peak_memory() -> int:
    """The most memory that this process has held, in bytes; on a GPU the most of the GPU's."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def save_update(
    folder: Path, client: int, update: Update, base: Mapping[str, Tensor], federation: Federation
) -> None:
    """A client's model after its local steps as `folder/client-K`, beside `folder/base`, what it
    started from: folders that `merge`, `inspect`, `evaluate` and transformers read.

    Merging these gives the round's new model. The working net is left with other values than
    before. The client's own parameters are base + delta, which rounds, only where it did not say
    what they are.
    """
    start, net, delta = folder / "base", federation.net, update.delta
    state = state_of(net)
    facts = {"task": federation.task.name, "seed": federation.recipe.seed}
    if not start.is_dir():
        load_state(state, base)
        write_model(start, net, facts)
    whole = isinstance(delta, Difference)
    load_state(state, delta.tuned if whole else {n: base[n] + delta[n] for n in base})
    known = {n: v for n, v in asdict(update.source).items() if n != "name" and v is not None}
    origin = {"id": str(start), "fingerprint": fingerprint(read_layout(start))}
    write_model(folder / f"client-{client}", net, {"base": origin, **facts, **known})
