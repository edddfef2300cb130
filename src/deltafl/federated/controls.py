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

    def _files(self, client: int, number: int) -> list[Path]:
        """Of a client, from before a round, the oldest first."""
        past = self.folder / f"{client}-{number:06}"
        return [file for file in sorted(self.folder.glob(f"{client}-*")) if file < past]

    def read(self, client: int, number: int, like: Tensor) -> Tensor:
        """c_i (k,) with which a client begins a round, memory-mapped; 0 where it never took
        part.
        """
        for last in self._files(client, number)[-1:]:
            with safe_open(last, "pt") as file:
                return file.get_tensor("control").to(like.device)
        return torch.zeros_like(like)

    def write(self, client: int, number: int, control: Tensor) -> None:
        """Keep what a client made in a round."""
        data = save({"control": control.cpu().contiguous()})
        write_atomically(self.folder / f"{client}-{number:06}.safetensors", data)

    def prune(self, number: int, num_clients: int) -> None:
        """Delete the files that no round from `number` on, the last on disk, reads."""
        for client in range(num_clients):
            for old in self._files(client, number)[:-1]:
                old.unlink()

    def step(
        self, state: ServerState, updates: Mapping[int, ClientUpdate], num_clients: int
    ) -> ServerState:
        """c <- c + sum_i (c_i+ - c_i) / K, and every c_i+ kept for its client's next round; `state`
        as it is where there is no c.

        Raises:
            DeltaflError: an update without a new control.
        """
        control = state.control
        if control is None:
            return state
        for k, update in updates.items():
            if update.control is None:
                raise DeltaflError(
                    "scaffold needs clients that return their new control; this one's updates "
                    "have none"
                )
            change = update.control - self.read(k, state.round, control)
            control = control + change / num_clients
            self.write(k, state.round, update.control)
        return replace(state, control=control)
