"""The state of a run on disk: one file, whole or absent, written while the next rounds go on."""

import json
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from deltafl.errors import DeltaflError
from deltafl.federated.server import ServerState
from deltafl.files import atomic_file

PAUSE = 100
"""A state is not begun before so many times as long as the last one took, so that writing takes 1
% of the time.
"""


@dataclass(frozen=True)
class Best:
    """The parameters with the best validation score, after which round, and how many validations
    ago.
    """

    params: Mapping[str, Tensor]
    round: int
    score: float
    waited: int = 0


def write_state(path: Path, state: ServerState, best: Best) -> None:
    """A safetensors file: `PART/NAME` for each tensor, the numbers as JSON in its metadata."""
    parts = {"params": state.params, "m": state.m, "v": state.v}
    if best.round != state.round:
        parts["best"] = best.params
    tensors = {f"{part}/{n}": t.detach() for part, held in parts.items() for n, t in held.items()}
    if state.control is not None:
        tensors["control"] = state.control
    numbers = {
        "round": state.round,
        "control_rounds": state.control_rounds,
        "best": [best.round, best.score, best.waited],
    }
    with atomic_file(path) as temporary:
        save_file(tensors, temporary, {"state": json.dumps(numbers)})


def read_state(path: Path, like: ServerState) -> tuple[ServerState, Best]:
    """What `write_state` wrote, on the devices of `like`.

    Raises:
        DeltaflError: not such a file, or of another model.
    """
    try:
        with safe_open(path, "pt") as file:
            numbers: dict[str, Any] = json.loads(file.metadata()["state"])
            held = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        round, control_rounds = numbers["round"], numbers["control_rounds"]
        best_round, score, waited = numbers["best"]
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise DeltaflError(
            f'"{path}" is not the state of a run ({error}); delete the folder to start again'
        ) from None

    def part(name: str) -> dict[str, Tensor]:
        found = {n: (held.get(f"{name}/{n}"), t.device) for n, t in like.params.items()}
        return {n: t.to(device) for n, (t, device) in found.items() if t is not None}

    params, control = part("params"), held.get("control")
    if params.keys() != like.params.keys() or (control is None) != (like.control is None):
        raise DeltaflError(f'"{path}" holds another model; delete the folder to start again')
    if control is not None and like.control is not None:
        control = control.to(like.control.device)
    state = ServerState(
        round, params, part("m"), part("v"), control, {int(k): r for k, r in control_rounds.items()}
    )
    return state, Best(params if best_round == round else part("best"), best_round, score, waited)


class StateWriter:
    """Writes states in the background. A state is immutable, so nothing is copied and rounds go on
    meanwhile.

    While one is being written, and `PAUSE` times as long after it, the next ones are not: a resumed
    run repeats those rounds, to the same bits. `before` is called first, `after` last, in the
    background too: what the state counts on must be on the disk earlier.
    """

    def __init__(
        self,
        path: Path,
        before: Callable[[], None] = lambda: None,
        after: Callable[[ServerState], None] = lambda state: None,
    ) -> None:
        self.path, self.before, self.after = path, before, after
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._next = 0.0

    def offer(self, state: ServerState, best: Best) -> bool:
        """Start to write unless it is too soon after another one; whether it did."""
        if time.monotonic() < self._next or (self._thread is not None and self._thread.is_alive()):
            return False
        self.finish()
        self._thread = threading.Thread(target=self._write, args=(state, best))
        self._thread.start()
        return True

    def finish(self) -> None:
        """Wait for the last one. Raises what went wrong with it."""
        if self._thread is not None:
            self._thread.join()
        if self._error is not None:
            raise self._error

    def _write(self, state: ServerState, best: Best) -> None:
        started = time.monotonic()
        try:
            self.before()
            write_state(self.path, state, best)
            self.after(state)
            done = time.monotonic()
            self._next = done + PAUSE * (done - started)
        except BaseException as error:
            self._error = error
