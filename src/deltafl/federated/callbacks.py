"""What is done after each round: validation, bytes, the record, the state, clients' models."""

import resource
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deltafl.federated.client import load_state
from deltafl.federated.rounds import Federation, RoundResult, Workers
from deltafl.federated.saving import save_update
from deltafl.federated.server import ServerState
from deltafl.federated.setup import calibration_clients
from deltafl.federated.sharding import describe
from deltafl.federated.state import Best, StateWriter
from deltafl.progress import OnProgress, Progress
from deltafl.sparse.eligible import eligible
from deltafl.tasks.task import Split
from deltafl.training.recipe import PRECISIONS
from deltafl.training.record import RunRecord
from deltafl.training.step import scores

Row = dict[str, Any]


class Callback:
    """Something that is done after each round. The row of a round in the record is what callbacks
    leave in it.
    """

    def begin(self, state: ServerState, row: Row) -> None:
        """Before the first round; `row` is that of round 0. A resumed run has begun."""

    def after(self, state: ServerState, result: RoundResult, row: Row) -> None:
        """A round led to `state`; `row` holds what callbacks before this one put into it."""

    def end(self) -> None:
        """The rounds are over, or broken off."""


def score_of(federation: Federation, params: Mapping[str, Tensor], split: Split) -> float:
    """Mean score over examples of the model with these parameters, which the working net keeps."""
    load_state(federation.net, params)
    autocast = PRECISIONS[federation.recipe.mixed_precision]
    return scores(federation.net, federation.task, split, autocast=autocast).double().mean().item()


@dataclass
class Validation(Callback):
    """The validation score every `eval_every` rounds, and the best model so far; of equal ones the
    first.
    """

    federation: Federation
    best: Best

    @property
    def is_exhausted(self) -> bool:
        """Whether patience ends the run."""
        patience = self.federation.recipe.patience
        return patience is not None and self.best.waited >= patience

    def begin(self, state: ServerState, row: Row) -> None:
        self._judge(state, row)

    def after(self, state: ServerState, result: RoundResult, row: Row) -> None:
        recipe = self.federation.recipe
        row["val_score"] = None
        if state.round % recipe.eval_every == 0 or state.round == recipe.num_rounds:
            self._judge(state, row)

    def _judge(self, state: ServerState, row: Row) -> None:
        row["val_score"] = score = score_of(self.federation, state.params, "val")
        if score > self.best.score:
            self.best = Best(state.params, state.round, score)
        else:
            self.best = replace(self.best, waited=self.best.waited + 1)


@dataclass
class Shards(Callback):
    """How many examples and groups clients hold, in the first row."""

    federation: Federation

    def begin(self, state: ServerState, row: Row) -> None:
        groups = self.federation.task.groups("train")
        told = describe(self.federation.shards, groups, int(groups.max()) + 1)
        row["smallest_client"], row["largest_client"] = told.smallest, told.largest
        row["groups_per_client"] = [int(told.classes.min()), int(told.classes.max())]


class Bytes(Callback):
    """Bytes that go over the network, per round and in all, with the mask and as if there were
    none.

    A client gets and sends 4 bytes for each kept coordinate and each value of float buffers;
    scaffold doubles the trained ones. The mask's bits go to a client once. The pre-trained model
    is at the clients already; what step 0 sends is `setup_bytes`, in the first row.
    """

    def __init__(self, federation: Federation) -> None:
        net, recipe, mask = federation.net, federation.recipe, federation.mask
        self._federation = federation
        self._seen: set[int] = set()
        self._done = self._up = self._down = self._dense = 0
        self.parameters = net.flat.numel()
        self.kept = self.parameters if mask is None else sum(int(m.sum()) for m in mask.values())
        extra = sum(t.numel() for t in net.state().values()) - self.parameters
        times = 2 if recipe.local.algorithm.has_control else 1
        self._payload = 4 * (times * self.kept + extra)
        self._dense_payload = 4 * (times * self.parameters + extra)
        self._mask_bytes = 0 if mask is None else -(-self.parameters // 8)

    def begin(self, state: ServerState, row: Row) -> None:
        row |= {"parameters": self.parameters, "kept": self.kept, **setup_bytes(self._federation)}

    def after(self, state: ServerState, result: RoundResult, row: Row) -> None:
        while self._done < state.round - 1:  # rounds before a resume
            self._count(self._done + 1)
        row["bytes_up"], row["bytes_down"] = self._count(state.round)
        row["bytes_up_total"], row["bytes_down_total"] = self._up, self._down
        row["dense_bytes_up_total"] = self._dense

    def _count(self, number: int) -> tuple[int, int]:
        """Bytes up and down of round `number`; rounds are counted in order."""
        chosen = self._federation.recipe.clients_in(number)
        fresh = [k for k in chosen if k not in self._seen]
        self._seen.update(fresh)
        up = self._payload * len(chosen)
        down = up + self._mask_bytes * len(fresh)
        self._done, self._up, self._down = number, self._up + up, self._down + down
        self._dense += self._dense_payload * len(chosen)
        return up, down


def setup_bytes(federation: Federation) -> dict[str, int]:
    """Bytes of step 0, `setup_bytes_up` and `setup_bytes_down`, of all clients together; no round
    counts them.

    Up: what fitting the head needs (`Net.head_bytes`); of each client of a calibration a
    float32 Fisher sum for each eligible coordinate. Down: a frozen head to every client once, a
    trained one to the clients of a calibration, since rounds count it.
    """
    recipe, net = federation.recipe, federation.net
    up, head = net.head_bytes(recipe.head, federation.shards)
    asked = sum(map(len, calibration_clients(recipe)))
    up += asked * 4 * sum(int(m.sum()) for m in eligible(net).values()) if asked else 0
    down = head * (asked if recipe.head.train_head else recipe.sharding.num_clients)
    return {"setup_bytes_up": up, "setup_bytes_down": down}


@dataclass
class Record(Callback):
    """The run's rows; the last of the callbacks that fill them. `on_progress` is told of each."""

    record: RunRecord
    num_rounds: int
    workers: Workers
    on_progress: OnProgress

    def begin(self, state: ServerState, row: Row) -> None:
        self.record.append(row)
        self._tell(row)

    def after(self, state: ServerState, result: RoundResult, row: Row) -> None:
        row["peak_memory_bytes"] = peak_memory() + self.workers.memory
        self.record.append(row, sync=False)
        self._tell(row)

    def _tell(self, row: Row) -> None:
        score = row["val_score"]
        seen = {} if score is None else {"validation": score}
        self.on_progress(Progress("rounds", row["round"], self.num_rounds, seen))


def peak_memory() -> int:
    """The most memory that this process has held, in bytes; on a GPU the most of the GPU's."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@dataclass
class StateFile(Callback):
    """What a killed run goes on from."""

    writer: StateWriter
    validation: Validation

    def after(self, state: ServerState, result: RoundResult, row: Row) -> None:
        self.writer.offer(state, self.validation.best)

    def end(self) -> None:
        self.writer.finish()


@dataclass
class ClientModels(Callback):
    """The clients' models of some rounds, as OUT/updates/round-R/client-K beside what they started
    from.
    """

    federation: Federation
    out: Path

    def after(self, state: ServerState, result: RoundResult, row: Row) -> None:
        rounds = map(str, self.federation.recipe.save_client_updates)
        if {"all", str(state.round)} & set(rounds):
            folder = self.out / "updates" / f"round-{state.round:04d}"
            for client, update in result.updates.items():
                save_update(folder, client, update, result.start.params, self.federation)
