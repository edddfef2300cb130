"""Processes, forked once in a run, that train the clients of each round on several cores, to the same bits as one."""

import os
import signal
import struct
import sys
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, Pipe, wait
from typing import Any, NoReturn

import torch
from torch import Tensor

from deltafl.errors import DeltaflError
from deltafl.federated.parcels import SharedMemory, pack, pack_error, room_for, unpack
from deltafl.federated.recipe import FederatedRecipe
from deltafl.federated.server import ServerState

JOB = struct.Struct("4i")
"""Position in the round, number of the round, client, round of the client's own control variate or -1."""

ANSWER = struct.Struct("2i")
"""Position, KiB that the process has needed beside what it shares; what `pack` gave follows."""

CONTROL = "deltafl_control"

Train = Callable[[Mapping[str, Tensor], Tensor | None, int, int, int], Any]
"""(params, control, number, client, round of its own control) -> anything that can be pickled."""


def count_workers(asked: int | None, recipe: FederatedRecipe, device: torch.device) -> int:
    """How many processes train the clients of a round: at most one for each client.

    None: as many as torch has threads, where that is possible; 1 for a user's own client, who may remember things.

    Raises:
        DeltaflError: fewer than 1, or several where processes cannot be forked for training.
    """
    if asked is not None and asked < 1:
        raise DeltaflError(f"workers must be 1 or more, not {asked}")
    reasons = {
        f"they are for CPUs, and the device is {device}": device.type != "cpu",
        f"they need Linux, and this is {sys.platform}": sys.platform != "linux",
        "torch does not train in forked processes where there is a GPU": torch.cuda.is_available(),
    }
    reason = next((text for text, holds in reasons.items() if holds), None)
    if asked is None:
        asked = 1 if reason or recipe.client is not None else torch.get_num_threads()
    if asked > 1 and reason:
        raise DeltaflError(f"no {asked} workers here: {reason}; use workers 1")
    return min(asked, recipe.clients_per_round)


@contextmanager
def one_thread(device: torch.device) -> Iterator[None]:
    """On a CPU a client computes with one thread, in whichever process: sums then have one order on every machine."""
    before = torch.get_num_threads()
    if device.type != "cpu" or before == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Workers:
    """`count` forked processes that call `train` for one client after the other, whoever is free for the next one.

    Parameters and the server's control variate go to all of them through shared memory, written once a round; the
    tensors of a result come back in a slot of shared memory for each client, of which only the used pages take room,
    and the rest in a pipe. `known`: objects from before the fork that results may refer to, by name. A process ends
    when its parent does, however that ends.
    """

    def __init__(
        self,
        count: int,
        train: Train,
        state: ServerState,
        slots: int,
        known: Mapping[str, object] | None = None,
    ) -> None:
        given = _with_control(state)
        room = room_for(given.values())
        board = SharedMemory(room)
        self._given = {n: board.hold(t) for n, t in given.items()}
        self._slots = [SharedMemory(room) for _ in range(slots)]
        self._known = dict(known or {})
        self._pids: dict[Connection, int] = {}
        self.memory: dict[int, int] = {}
        jobs, self._jobs = os.pipe()
        try:
            for _ in range(count):
                self._fork(train, jobs)
        except OSError as error:
            self.close()
            raise DeltaflError(
                f"cannot start {count} workers ({error}); use fewer, or workers 1"
            ) from None
        finally:
            os.close(jobs)

    def _fork(self, train: Train, jobs: int) -> None:
        ours, theirs = Pipe(duplex=False)
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", DeprecationWarning
            )  # of threads: a child with one never meets torch's pool
            pid = os.fork()
        if pid == 0:
            self._serve(train, jobs, theirs)
        theirs.close()
        self._pids[ours] = pid

    def _serve(self, train: Train, jobs: int, answers: Connection) -> NoReturn:
        """The life of a process: jobs until there are no more, then out without a trace of its parent's plans."""
        try:
            os.close(self._jobs)
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends it
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            torch.set_num_threads(1)
            control = self._given.pop(CONTROL, None)
            known = {id(self._given): "params"} | {
                id(value): name for name, value in self._known.items()
            }
            before = _most_memory()
            while job := os.read(jobs, JOB.size):
                position, number, client, own = JOB.unpack(job)
                try:
                    answer = pack(
                        train(self._given, control, number, client, own),
                        known,
                        self._slots[position],
                    )
                except BaseException as error:
                    answer = pack_error(error)
                answers.send_bytes(ANSWER.pack(position, _most_memory() - before) + answer)
        finally:
            os._exit(0)

    def train(self, state: ServerState, clients: Sequence[int]) -> Iterator[Any]:
        """What `train` returns for each client, in their order. Valid until the next call.

        Raises:
            DeltaflError: a process died. And whatever `train` raised for the first client for whom it did.
        """
        if not self._pids:
            raise DeltaflError("the workers of this run have ended; start it again with --resume")
        for name, tensor in _with_control(state).items():
            self._given[name].copy_(tensor)
        known = self._known | {"params": state.params}
        jobs = deque(
            JOB.pack(i, state.round + 1, k, state.control_rounds.get(k, -1))
            for i, k in enumerate(clients)
        )
        done: dict[int, bytes] = {}
        asked = 0
        try:
            for position in range(len(clients)):
                while position not in done:
                    while jobs and asked < 2 * len(
                        self._pids
                    ):  # whoever is free finds another one at once
                        with suppress(BrokenPipeError):
                            os.write(self._jobs, jobs.popleft())
                        asked += 1
                    for ours in wait(list(self._pids)):
                        found, answer = self._receive(ours)
                        done[found] = answer
                        asked -= 1
                yield unpack(done.pop(position), known, self._slots[position])
        except (
            BaseException
        ):  # what was not awaited must not be taken for an answer of the next round
            self.close()
            raise

    def _receive(self, ours: Any) -> tuple[int, bytes]:
        try:
            message = ours.recv_bytes()
        except (EOFError, OSError):
            pid = self._pids.pop(ours)
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            how = (
                f"was killed by {signal.Signals(-code).name}"
                if code < 0
                else f"ended with status {code}"
            )
            raise DeltaflError(
                f"a worker that trains clients (process {pid}) {how}; if memory ran out, use fewer workers; "
                "the run goes on with --resume"
            ) from None
        position, grown = ANSWER.unpack_from(message)
        self.memory[self._pids[ours]] = 1024 * grown
        return position, message[ANSWER.size :]

    def close(self) -> None:
        """End all processes; they hold nothing that is not elsewhere."""
        if self._jobs >= 0:
            os.close(self._jobs)
            self._jobs = -1
        while self._pids:
            ours, pid = self._pids.popitem()
            ours.close()
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def _with_control(state: ServerState) -> dict[str, Tensor]:
    return dict(state.params) | ({} if state.control is None else {CONTROL: state.control})


def _most_memory() -> int:
    """KiB that this process has held at most."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
