"""What a killed run needs to continue: one file, whole or absent, that says which run it belongs
to.
"""

import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from deltafl.errors import DeltaflError
from deltafl.files import write_atomically
from deltafl.models import Net
from deltafl.recipes import Recipe
from deltafl.tasks import Task

State = Mapping[str, Any]
"""What torch.save can hold of a run."""


def state_path(out: str | Path) -> Path:
    """`OUT.state`, beside the output."""
    out = Path(out)
    return out.with_name(f"{out.name}.state")


def run_config(net: Net, task: Task, recipe: Recipe) -> dict[str, Any]:
    """All that decides the result, as JSON values: the recipe, and base and data by hash."""
    return {
        **recipe.content(),
        "base_fingerprint": net.fingerprint,
        "task": task.name,
        "task_fingerprint": task.fingerprint(),
        "num_examples": task.size("train"),
    }


def require_same_config(found: Mapping[str, Any], wanted: Mapping[str, Any], where: Path) -> None:
    """Refuse to continue another run. Where data and base lie makes no difference, what they hold
    does.

    Raises:
        DeltaflError: one line for each key that differs.
    """
    old, new = dict(_leaves(found)), dict(_leaves(wanted))
    paths = {"data.data", "data.data_dir"} | ({"model"} if new.get("base_fingerprint") else set())
    different = [
        f'"{where}" was made with {key} = {old.get(key)!r}, now it is {new.get(key)!r}'
        for key in sorted((old.keys() | new.keys()) - paths)
        if old.get(key) != new.get(key)
    ]
    if different:
        raise DeltaflError(
            *different, "resume with the same configuration, or start again with --overwrite"
        )


def _leaves(config: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{path}{key}.")
        else:
            yield path + key, value


def write_state(file: Path, config: Mapping[str, Any], state: State) -> None:
    """Replace `file` in one step, so that a kill leaves the old state or the new one."""
    buffer = io.BytesIO()
    torch.save({"config": dict(config), **state}, buffer)
    write_atomically(file, buffer.getvalue())


def read_state(file: Path, config: Mapping[str, Any]) -> State | None:
    """The state in `file`, None where there is none.

    Raises:
        DeltaflError: of another configuration, or not a state file.
    """
    if not file.exists():
        return None
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
        found = state["config"]
    except Exception as error:  # torch.load has no common error for what is not its file
        raise DeltaflError(
            f'"{file}" is not the state of a run; delete it to start again'
        ) from error
    require_same_config(found, config, file)
    return state
