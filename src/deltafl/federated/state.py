"""The state of a run on disk: one file, whole or absent, written while the next rounds go on."""

import json
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from deltafl.errors import DeltaflError
from deltafl.federated.controls import Controls
from deltafl.federated.server import ServerState
from deltafl.files import write_atomically

PARTS = ("params", "m", "v", "best")
NUMBERS = ("round", "control_rounds", "best_round", "best_accuracy", "waited")


def encode(state: ServerState, head: Mapping[str, Tensor]) -> bytes:
    """A safetensors file: `PART/NAME` for each tensor, the numbers as JSON in its metadata.

    `head`: the tensors of a frozen head; a trained one is among the parameters.
    """
    parts = [part for part in PARTS if part != "best" or state.best_round != state.round]
    tensors = {f"{part}/{n}": t for part in parts for n, t in getattr(state, part).items()}
    tensors |= {f"head/{n}": t for n, t in head.items()}
    if state.control is not None:
        tensors["control"] = state.control
    numbers = {name: getattr(state, name) for name in NUMBERS}
    return save({n: t.detach().cpu().contiguous() for n, t in tensors.items()}, {"state": json.dumps(numbers)})


def decode(path: Path, like: ServerState) -> tuple[ServerState, dict[str, Tensor]]:
    """What `encode` wrote, on the devices of `like`, and the head's tensors.

    Raises:
        DeltaflError: not such a file, or of another model.
    """
    try:
        with safe_open(path, "pt") as file:
            numbers: dict[str, Any] = {key: json.loads(file.metadata()["state"])[key] for key in NUMBERS}
            held = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise DeltaflError(f'"{path}" is not the state of a run ({error}); delete the folder to start again') from None
    parts = {
        part: {n: held[f"{part}/{n}"].to(t.device) for n, t in like.params.items() if f"{part}/{n}" in held}
        for part in PARTS
    }
    if parts["params"].keys() != like.params.keys():
        raise DeltaflError(f'"{path}" holds another model; delete the folder to start again')
    if numbers["best_round"] == numbers["round"]:
        parts["best"] = parts["params"]
    control = held.get("control")
    state = replace(
        like,
        **parts,
        round=numbers["round"],
        control=None if control is None or like.control is None else control.to(like.control.device),
        control_rounds={int(k): r for k, r in numbers["control_rounds"].items()},
        best_round=numbers["best_round"],
        best_accuracy=numbers["best_accuracy"],
        waited=numbers["waited"],
    )
    return state, {n.removeprefix("head/"): t for n, t in held.items() if n.startswith("head/")}


class StateWriter:
    """Writes states in the background. A state is immutable, so nothing is copied and rounds go on meanwhile.

    While one is being written the next ones are not: a resumed run repeats those rounds, to the same bits. `before` is
    called first, in the background too: what the state counts on must be on the disk earlier.
    """

    def __init__(
        self, path: Path, head: Mapping[str, Tensor], controls: Controls, before: Callable[[], None] = lambda: None
    ) -> None:
        self.path, self.head, self.controls, self.before = path, head, controls, before
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def offer(self, state: ServerState) -> bool:
        """Start to write `state` unless another one is being written; whether it did."""
        if self._thread is not None and self._thread.is_alive():
            return False
        self.finish()
        self._thread = threading.Thread(target=self._write, args=(state,))
        self._thread.start()
        return True

    def finish(self) -> None:
        """Wait for the last one. Raises what went wrong with it."""
        if self._thread is not None:
            self._thread.join()
        if self._error is not None:
            raise self._error

    def _write(self, state: ServerState) -> None:
        try:
            self.before()
            write_atomically(self.path, encode(state, self.head))
            self.controls.prune(state.control_rounds)
        except BaseException as error:
            self._error = error
