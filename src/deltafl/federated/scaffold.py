"""SCAFFOLD's control variates: the clients' in files, for K vectors of the model's size need not
fit into memory.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from deltafl.algebra.deltas import Update
from deltafl.errors import DeltaflError
from deltafl.federated.client import ClientUpdate
from deltafl.federated.server import ServerState
from deltafl.files import write_atomically


class Controls:
    """c_i of each client, one file for each (client, round): a round never overwrites what a
    resumed run starts from.

    `prune` deletes what is not needed any more.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def _path(self, client: int, number: int) -> Path:
        return self.folder / f"client-{client}-round-{number}.safetensors"

    def read(self, client: int, number: int) -> Tensor:
        """c_i (P,) that a client made in a round, memory-mapped."""
        with safe_open(self._path(client, number), "pt") as file:
            return file.get_tensor("control")

    def write(self, client: int, number: int, control: Tensor) -> None:
        """Keep what a client made in a round."""
        write_atomically(self._path(client, number), save({"control": control.cpu().contiguous()}))

    def prune(self, state: ServerState) -> None:
        """Delete the files of rounds before those that `state` refers to."""
        rounds = state.control_rounds
        for file in self.folder.glob("client-*.safetensors") if self.folder.is_dir() else ():
            _, client, _, number = file.stem.split("-")
            if int(number) < rounds.get(int(client), 0):
                file.unlink()


def correction(controls: Controls, control: Tensor, client: int, number: int | None) -> Tensor:
    """c - c_i of a client whose own is from round `number`; c_i is 0 where it never took part."""
    if number is None:
        return control
    return control - controls.read(client, number).to(control.device)


def with_controls(
    state: ServerState,
    updates: Mapping[int, Update],
    controls: Controls,
    num_clients: int,
) -> ServerState:
    """c <- c + sum_i (c_i+ - c_i) / K, and every c_i+ kept for its client's next round; `state` as
    it is where there is no c.

    Raises:
        DeltaflError: an update without a new control.
    """
    control, rounds = state.control, dict(state.control_rounds)
    if control is None:
        return state
    for k, update in updates.items():
        new = update.control if isinstance(update, ClientUpdate) else None
        if new is None:
            raise DeltaflError(
                "scaffold needs clients that return their new control; this one's updates have none"
            )
        own = controls.read(k, rounds[k]).to(control.device) if k in rounds else None
        control = control + (new if own is None else new - own) / num_clients
        controls.write(k, state.round, new)
        rounds[k] = state.round
    return replace(state, control=control, control_rounds=rounds)
