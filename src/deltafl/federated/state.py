"""The state of a run on disk: one file, whole or absent, written while the next rounds go on."""

import json
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from deltafl.checkpoints.checkpoint import NAMES as DTYPE_NAMES
from deltafl.errors import DeltaflError
from deltafl.federated.controls import Controls
from deltafl.federated.server import ServerState
from deltafl.files import write_atomically

PARTS = ("params", "m", "v", "best")
NUMBERS = ("round", "control_rounds", "best_round", "best_score", "waited")


PAUSE = 100
"""A state is not begun before so many times as long as the last one took, so that writing takes 1 % of the time."""


def encode(state: ServerState, head: Mapping[str, Tensor]) -> list[bytes | memoryview]:
    """The parts of a safetensors file: `PART/NAME` for each tensor, the numbers as JSON in its metadata.

    `head`: the tensors of a frozen head; a trained one is among the parameters. On the CPU no tensor is copied.
    """
    parts = [part for part in PARTS if part != "best" or state.best_round != state.round]
    held = {f"{part}/{n}": t for part in parts for n, t in getattr(state, part).items()}
    held |= {f"head/{n}": t for n, t in head.items()}
    if state.control is not None:
        held["control"] = state.control
    numbers = {name: getattr(state, name) for name in NUMBERS}
    header: dict[str, Any] = {"__metadata__": {"state": json.dumps(numbers)}}
    data: list[bytes | memoryview] = []
    stop = 0
    for name, tensor in sorted(held.items(), key=lambda item: -item[1].element_size()):
        flat = tensor.detach().cpu().reshape(-1).view(torch.uint8)
        start, stop = stop, stop + len(flat)
        header[name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, stop],
        }
        data.append(memoryview(flat.numpy()))  # type: ignore[arg-type]
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    return [len(raw).to_bytes(8, "little") + raw, *data]


def decode(path: Path, like: ServerState) -> tuple[ServerState, dict[str, Tensor]]:
    """What `encode` wrote, on the devices of `like`, and the head's tensors.

    Raises:
        DeltaflError: not such a file, or of another model.
    """
    try:
        with safe_open(path, "pt") as file:
            numbers: dict[str, Any] = {
                key: json.loads(file.metadata()["state"])[key] for key in NUMBERS
            }
            held = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise DeltaflError(
            f'"{path}" is not the state of a run ({error}); delete the folder to start again'
        ) from None
    parts = {
        part: {
            n: held[f"{part}/{n}"].to(t.device)
            for n, t in like.params.items()
            if f"{part}/{n}" in held
        }
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
        control=None
        if control is None or like.control is None
        else control.to(like.control.device),
        control_rounds={int(k): r for k, r in numbers["control_rounds"].items()},
        best_round=numbers["best_round"],
        best_score=numbers["best_score"],
        waited=numbers["waited"],
    )
    return state, {n.removeprefix("head/"): t for n, t in held.items() if n.startswith("head/")}


class StateWriter:
    """Writes states in the background. A state is immutable, so nothing is copied and rounds go on meanwhile.

    While one is being written, and `PAUSE` times as long after it, the next ones are not: a resumed run repeats those
    rounds, to the same bits. `before` is called first, in the background too: what the state counts on must be on the
    disk earlier.
    """

    def __init__(
        self,
        path: Path,
        head: Mapping[str, Tensor],
        controls: Controls,
        before: Callable[[], None] = lambda: None,
    ) -> None:
        self.path, self.head, self.controls, self.before = path, head, controls, before
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._next = 0.0

    def offer(self, state: ServerState) -> bool:
        """Start to write `state` unless it is too soon after another one; whether it did."""
        if time.monotonic() < self._next or (self._thread is not None and self._thread.is_alive()):
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
        started = time.monotonic()
        try:
            self.before()
            write_atomically(self.path, encode(state, self.head))
            self.controls.prune(state.control_rounds)
            done = time.monotonic()
            self._next = done + PAUSE * (done - started)
        except BaseException as error:
            self._error = error
