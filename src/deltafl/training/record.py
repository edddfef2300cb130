"""What a run leaves behind: its resolved settings, one row per event, and what it goes on from.

    RUN/config.yaml     the settings, resolved
    RUN/record.jsonl    one JSON object per line, appended as things happen
    RUN/state/          what a resumed run needs
    RUN/result.json     what came out, when all is done

Rows hold no clock times, so that two runs with one seed leave equal records; how long something
took is an ordinary field of a row that says so in its name (`seconds`).
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
import yaml

from deltafl.errors import DeltaflError
from deltafl.files import atomic_file, check_output, clear_unfinished, write_atomically
from deltafl.models import Net
from deltafl.recipes import Recipe, load_yaml
from deltafl.tasks import Task

Row: TypeAlias = dict[str, Any]
"""What JSON, or torch.save, can hold."""


@dataclass(frozen=True)
class FinishedRun:
    """What came out: the folder, the result (as in result.json) and every row of the record."""

    out: Path
    result: Row
    rows: list[Row]


class RunRecord:
    """The record in the folder of a run."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.path = self.folder / "record.jsonl"

    @classmethod
    def create(cls, folder: str | Path, config: Mapping[str, object]) -> "RunRecord":
        """Start a record in `folder`, which may hold other files but no record."""
        record = cls(folder)
        text = yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True)
        write_atomically(record.folder / "config.yaml", text.encode())
        write_atomically(record.path, b"")
        return record

    def begun(self, config: Mapping[str, object], *, resume: bool, overwrite: bool) -> bool:
        """Whether a run of this configuration is to go on here; else a new one may begin.

        Raises:
            DeltaflError: an output is in the way, or the run is of another configuration.
        """
        if not (resume and self.path.is_file()):
            check_output(self.folder, overwrite=overwrite)
            return False
        require_same_config(load_yaml(self.folder / "config.yaml"), config, self.folder)
        return True

    def append(self, row: Mapping[str, object], *, sync: bool = True) -> None:
        """Add one row and hand it to the operating system before returning; with `sync` all rows
        also to the disk.

        Raises:
            TypeError: a value is not JSON.
        """
        line = f"{_json(row)}\n".encode()
        with self.path.open("ab") as file:
            file.write(line)
            file.flush()
            if sync:
                os.fsync(file.fileno())

    def rewind(self, key: str, last: int) -> None:
        """Keep the rows whose `key` is at most `last`, none where that is 0: those from before the
        state that a resumed run starts from. Pieces of files that a kill left are deleted.
        """
        kept = [f"{_json(row)}\n" for row in read_rows(self.path) if row.get(key, 0) <= last > 0]
        write_atomically(self.path, "".join(kept).encode())
        clear_unfinished(self.folder)

    @property
    def is_finished(self) -> bool:
        """Whether the run is at its end."""
        return (self.folder / "result.json").is_file()

    def finished(self) -> FinishedRun:
        """What a run that is at its end came to; its state goes."""
        shutil.rmtree(self.folder / "state", ignore_errors=True)
        result = json.loads((self.folder / "result.json").read_text())
        return FinishedRun(self.folder, result, read_rows(self.path))


def read_rows(path: str | Path) -> list[Row]:
    """The rows of a JSONL file. A last line without its newline was torn by a kill and is left out.

    Raises:
        DeltaflError: a line is not JSON (names file and line).
    """
    rows: list[Row] = []
    for number, line in enumerate(Path(path).read_bytes().split(b"\n")[:-1], 1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise DeltaflError(f'"{path}" line {number} is not JSON: {error}') from None
    return rows


def write_json(path: str | Path, value: object) -> Path:
    """Write `value` as indented JSON, whole or not at all; NaN and infinities become null."""
    return write_atomically(path, f"{_json(value, indent=2)}\n".encode())


def _json(value: object, indent: int | None = None) -> str:
    """`value` with NaN and infinities as null: JSON has no word for them."""
    finite = json.loads(json.dumps(value), parse_constant=lambda name: None)
    return json.dumps(finite, indent=indent, ensure_ascii=False)


def run_config(net: Net, task: Task, recipe: Recipe) -> Row:
    """All that decides the result, as JSON values: the recipe, and base and data by hash."""
    return {
        **recipe.content(),
        "base_fingerprint": net.fingerprint,
        "task": task.name,
        "task_fingerprint": task.fingerprint(),
        "num_examples": task.size("train"),
    }


def require_same_config(
    found: Mapping[str, object], wanted: Mapping[str, object], where: Path
) -> None:
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


def _leaves(config: Mapping[str, object], path: str = "") -> Iterator[tuple[str, object]]:
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{path}{key}.")
        else:
            yield path + key, value


def write_state(file: Path, config: Mapping[str, object], state: Mapping[str, object]) -> None:
    """Replace `file` in one step, so that a kill leaves the old state or the new one."""
    with atomic_file(file) as temporary:
        whole = {"config": dict(config), **state}
        # without checksums of its own, for half the time
        torch.save(whole, temporary, _use_new_zipfile_serialization=False)


def read_state(
    file: Path, config: Mapping[str, object], device: torch.device | str = "cpu"
) -> Row | None:
    """The state in `file`, its tensors on `device`; None where there is none.

    Raises:
        DeltaflError: of another configuration, or not a state file.
    """
    if not file.exists():
        return None
    try:
        state = torch.load(file, map_location=device, weights_only=True)
        found = state["config"]
    except Exception as error:  # torch.load has no common error for what is not its file
        raise DeltaflError(
            f'"{file}" is not the state of a run; delete it to start again'
        ) from error
    require_same_config(found, config, file)
    return state
