"""What a run leaves behind: its resolved settings, one row per event, and its state files.

    RUN/config.yaml     the settings, resolved
    RUN/record.jsonl    one JSON object per line, appended as things happen
    RUN/state/          what a resumed run needs

Rows hold no clock times, so that two runs with one seed leave equal records; how long something
took is an ordinary field of a row that says so in its name (`seconds`), and `without_timings`
drops it.
"""

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deltafl.errors import DeltaflError
from deltafl.files import clear_unfinished, write_atomically

Row = dict[str, Any]


@dataclass(frozen=True)
class FinishedRun:
    """What came out: the folder, the result (as in result.json) and every row of the record."""

    out: Path
    result: Mapping[str, Any]
    rows: tuple[Mapping[str, Any], ...]


class RunRecord:
    """The open record of one run directory.

    `RunRecord.create(folder, config)` starts a record and refuses a folder that has one;
    `RunRecord.resume(folder)` continues one, dropping the last line if a kill tore it.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.rows_path = self.folder / "record.jsonl"
        self.config_path = self.folder / "config.yaml"

    @classmethod
    def create(cls, folder: str | Path, config: Mapping[str, Any]) -> "RunRecord":
        """Start a record in `folder`, which may hold other files but no record.

        Raises:
            DeltaflError: the folder already holds a record.
        """
        record = cls(folder)
        if record.rows_path.exists() or record.config_path.exists():
            raise DeltaflError(
                f'"{record.folder}" already holds a run. Continue it with --resume, or choose '
                "another --out."
            )
        write_atomically(record.config_path, _yaml_bytes(config))
        write_atomically(record.rows_path, b"")
        return record

    @classmethod
    def resume(cls, folder: str | Path) -> "RunRecord":
        """Continue the record in `folder`; a torn last line is cut off, so the next row starts a
        line of its own, and pieces of files that a kill left are deleted.

        Raises:
            DeltaflError: there is no record, or a line other than a torn last one is not a JSON
            object.
        """
        record = cls(folder)
        record.rows()
        os.truncate(record.rows_path, len(_whole_lines(record.rows_path)))
        clear_unfinished(record.folder)
        return record

    def append(self, row: Mapping[str, Any], *, sync: bool = True) -> None:
        """Add one row and hand it to the operating system before returning; with `sync` also to the
        disk.

        Raises:
            TypeError: a value is not JSON.
        """
        line = json.dumps(_finite(row), ensure_ascii=False, allow_nan=False) + "\n"
        with self.rows_path.open("ab") as file:
            file.write(line.encode())
            file.flush()
            if sync:
                os.fsync(file.fileno())

    def sync(self) -> None:
        """Hand to the disk what was appended without `sync`."""
        with self.rows_path.open("rb") as file:
            os.fsync(file.fileno())

    def rewind(self, keep: Callable[[Row], bool]) -> None:
        """Drop the rows that `keep` refuses: what came after the state that a resumed run starts
        from.
        """
        rows = self.rows()
        kept = [row for row in rows if keep(row)]
        if len(kept) < len(rows):
            lines = [json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in kept]
            write_atomically(self.rows_path, "".join(lines).encode())

    def rows(self) -> list[Row]:
        """Every whole row, in the order in which they were appended."""
        return read_rows(self.rows_path)

    def config(self) -> dict[str, Any]:
        """The resolved settings.

        Raises:
            DeltaflError: the file is missing or is not a YAML mapping.
        """
        import yaml

        try:
            config = yaml.safe_load(self.config_path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise DeltaflError(
                f'"{self.config_path}" does not exist. Is "{self.folder}" a run directory?'
            ) from None
        except yaml.YAMLError as error:
            raise DeltaflError(
                f'"{self.config_path}" is not YAML: {" ".join(str(error).split())}'
            ) from None
        if not isinstance(config, dict):
            raise DeltaflError(
                f'"{self.config_path}" holds a {type(config).__name__}, not a mapping of settings.'
            )
        return config

    def write_state(self, name: str, data: bytes) -> Path:
        """Write the state file `name` whole or not at all; a path inside the run's `state/` folder
        is returned.
        """
        return write_atomically(self.folder / "state" / name, data)


def read_rows(path: str | Path) -> list[Row]:
    """The rows of a JSONL file. A last line without its newline was torn by a kill and is left out.

    Raises:
        DeltaflError: the file is missing, or a line is not a JSON object (names file and line).
    """
    path = Path(path)
    rows: list[Row] = []
    for number, line in enumerate(_whole_lines(path).split(b"\n")[:-1], 1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DeltaflError(f'"{path}" line {number} is not JSON: {error}') from None
        if not isinstance(row, dict):
            raise DeltaflError(
                f'"{path}" line {number} holds a {type(row).__name__}, not an object.'
            )
        rows.append(row)
    return rows


def killed_at_start(folder: Path) -> bool:
    """Whether `folder` holds no more than what `RunRecord.create` leaves where it is killed before
    its last file.
    """
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else {"no folder"}
    return all(
        n == "config.yaml"
        or (n.startswith((".config.yaml.", ".record.jsonl.")) and n.endswith(".tmp"))
        for n in names
    )


def write_json(path: str | Path, value: Any) -> Path:
    """Write `value` as indented JSON, whole or not at all; NaN and infinities become null."""
    text = json.dumps(_finite(value), indent=2, ensure_ascii=False, allow_nan=False)
    return write_atomically(path, f"{text}\n".encode())


def without_timings(rows: Iterable[Mapping[str, Any]]) -> list[Row]:
    """The rows without their `seconds`, `*_seconds` and `peak_memory_bytes`: what two runs with one
    seed share.
    """
    return [
        {
            k: v
            for k, v in row.items()
            if k not in ("seconds", "peak_memory_bytes") and not k.endswith("_seconds")
        }
        for row in rows
    ]


def _whole_lines(path: Path) -> bytes:
    """What `path` holds up to and with its last newline."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise DeltaflError(
            f'"{path}" does not exist. Is "{path.parent}" a run directory?'
        ) from None
    return data[: data.rfind(b"\n") + 1]


def _yaml_bytes(config: Mapping[str, Any]) -> bytes:
    import yaml

    return yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True).encode()


def _finite(value: Any) -> Any:
    """`value` with NaN and infinities as None: JSON has no word for them."""
    if isinstance(value, Mapping):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
