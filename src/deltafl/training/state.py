"""What a killed run needs to continue: one file, whole or absent, that says which run it belongs to."""

import hashlib
import io
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deltafl.checkpoints.layout import fingerprint, read_layout
from deltafl.errors import DeltaflError
from deltafl.files import write_atomically
from deltafl.models import LoadedEncoder
from deltafl.models.heads import LinearHead
from deltafl.tasks.arrays import Task

State = Mapping[str, Any]
"""step, module (its state dict), head (weight, bias), optimiser (its state dict)."""


def state_path(out: str | Path) -> Path:
    """`OUT.state`, beside the output."""
    out = Path(out)
    return out.with_name(f"{out.name}.state")


def run_config(
    encoder: LoadedEncoder, task: Task, recipe: Any, head: LinearHead | None
) -> dict[str, Any]:
    """All that decides the result, as JSON values: recipe (a dataclass), base, data, head, by hash where large."""
    on_disk = bool(encoder.origin) and (":" not in encoder.origin or Path(encoder.origin).is_dir())
    return {
        **asdict(recipe),
        **({} if head is None else {"head": _told(head)}),
        "base": encoder.origin,
        "base_fingerprint": fingerprint(read_layout(encoder.origin)) if on_disk else None,
        "task": task.name,
        "task_fingerprint": sha256_of(
            task.train.labels, task.train.images[:: max(1, len(task.train) // 64)]
        ),
        "num_examples": len(task.train),
        "class_names": list(task.class_names),
    }


def require_same_config(found: Mapping[str, Any], wanted: Mapping[str, Any], where: Path) -> None:
    """Refuse to continue another run.

    Raises:
        DeltaflError: one line for each key that differs.
    """
    found, wanted = dict(_leaves(found)), dict(_leaves(wanted))
    different = [
        f'"{where}" was made with {key} = {found.get(key)!r}, now it is {wanted.get(key)!r}'
        for key in sorted(found.keys() | wanted.keys())
        if found.get(key) != wanted.get(key)
    ]
    if different:
        raise DeltaflError(
            *different, "resume with the same configuration, or start again with --overwrite"
        )


def _leaves(config: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted path and value of every setting in the sections of a configuration."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value


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


def sha256_of(*tensors: Tensor) -> str:
    """Of the bytes of all tensors, in order."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _told(head: LinearHead) -> str:
    return f"given, {sha256_of(head.weight, head.bias)}" + (
        ", normalised" if head.normalised else ""
    )
