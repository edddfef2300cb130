"""Processes, forked once in a run, that train the clients of each round on several cores, to the same bits as one."""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from deltafl import pool
from deltafl.errors import DeltaflError
from deltafl.federated.recipe import FederatedRecipe
from deltafl.federated.server import ServerState

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
    """On a CPU a client computes with one thread, in whichever process."""
    with pool.one_thread() if device.type == "cpu" else nullcontext():
        yield


class Workers:
    """`count` forked processes that call `train` for one client after the other.

    Parameters and the server's control variate go to all of them through shared memory, written once
    a round; the tensors of a result come back through shared memory too. `known`: objects from before
    that results may refer to.
    """

    def __init__(
        self,
        count: int,
        train: Train,
        state: ServerState,
        slots: int,
        known: Sequence[object] = (),
    ) -> None:
        self._params = pool.SharedMemory.of(state.params)
        control = {} if state.control is None else {"": state.control}
        self._control = pool.SharedMemory.of(control).get("")
        self._pool = pool.Pool(
            lambda job: train(self._params, self._control, *job),
            count,
            slots=slots,
            room=pool.SharedMemory.room([*state.params.values(), *control.values()]),
            known=[self._params, *known],
        )

    @property
    def memory(self) -> Mapping[int, int]:
        """Bytes that each process has needed of its own."""
        return self._pool.memory

    def train(self, state: ServerState, clients: Sequence[int]) -> Iterator[Any]:
        """What `train` returns for each client, in their order. Valid until the next call."""
        for name, tensor in state.params.items():
            self._params[name].copy_(tensor)
        if self._control is not None and state.control is not None:
            self._control.copy_(state.control)
        jobs = [(state.round + 1, k, state.control_rounds.get(k, -1)) for k in clients]
        return self._pool.map(jobs)

    def close(self) -> None:
        """End all processes; they hold nothing that is not elsewhere."""
        self._pool.close()
