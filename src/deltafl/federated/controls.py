"""SCAFFOLD's control variates: the clients' in files, for K vectors of the model's size need not
fit into memory.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from deltafl.errors import DeltaflError
from deltafl.federated.client import ClientUpdate
from deltafl.federated.server import ServerState
from deltafl.files import write_atomically


@dataclass(frozen=True)
class Controls:
    """c_i of each client, one file for each (client, round): a round never overwrites what a
    resumed run starts from.
    """

    folder: Path

    def _file(self, client: int, number: int) -> Path:
        return self.folder / f"client-{client}-round-{number}.safetensors"

    def read(self, client: int, number: int | None, like: Tensor) -> Tensor:
        """c_i (P,) that a client made in a round, memory-mapped; 0 where it never took part."""
        if number is None:
            return torch.zeros_like(like)
        with safe_open(self._file(client, number), "pt") as file:
            return file.get_tensor("control").to(like.device)

    def write(self, client: int, number: int, control: Tensor) -> None:
        """Keep what a client made in a round."""
        write_atomically(self._file(client, number), save({"control": control.cpu().contiguous()}))

    def prune(self, state: ServerState) -> None:
        """Delete the files that `state`, the last one on disk, does not refer to."""
        wanted = {self._file(client, number) for client, number in state.control_rounds.items()}
        for file in set(self.folder.glob("*")) - wanted:
            file.unlink()

    def step(
        self, state: ServerState, updates: Mapping[int, ClientUpdate], num_clients: int
    ) -> ServerState:
        """c <- c + sum_i (c_i+ - c_i) / K, and every c_i+ kept for its client's next round; `state`
        as it is where there is no c.

        Raises:
            DeltaflError: an update without a new control.
        """
        control, rounds = state.control, dict(state.control_rounds)
        if control is None:
            return state
        for k, update in updates.items():
            if update.control is None:
                raise DeltaflError(
                    "scaffold needs clients that return their new control; this one's updates "
                    "have none"
                )
            change = update.control - self.read(k, rounds.get(k), control)
            control = control + change / num_clients
            self.write(k, state.round, update.control)
            rounds[k] = state.round
        return replace(state, control=control, control_rounds=rounds)
