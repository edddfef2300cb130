"""SCAFFOLD's control variates of the clients, in files: K vectors of the model's size need not fit into memory."""

from collections.abc import Mapping
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from deltafl.files import write_atomically


class Controls:
    """c_i of each client, one file for each (client, round): a round never overwrites what a resumed run starts from.

    `prune` deletes what no state refers to any more.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def _path(self, client: int, number: int) -> Path:
        return self.folder / f"client-{client}-round-{number}.safetensors"

    def read(self, client: int, rounds: Mapping[int, int]) -> Tensor | None:
        """c_i (P,), memory-mapped; None for a client that never took part: its control is 0."""
        if client not in rounds:
            return None
        with safe_open(self._path(client, rounds[client]), "pt") as file:
            return file.get_tensor("control")

    def write(self, client: int, number: int, control: Tensor) -> None:
        write_atomically(self._path(client, number), save({"control": control.cpu().contiguous()}))

    def prune(self, rounds: Mapping[int, int]) -> None:
        """Delete the files of rounds before the ones in `rounds`."""
        for file in self.folder.glob("client-*.safetensors") if self.folder.is_dir() else ():
            _, client, _, number = file.stem.split("-")
            if int(number) < rounds.get(int(client), 0):
                file.unlink()
