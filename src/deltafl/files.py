"""Files that are whole or absent, whatever kills the process."""

import contextlib
import os
import platform
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from deltafl.errors import DeltaflError


def write_atomically(path: str | Path, data: bytes | Iterable[bytes | memoryview]) -> Path:
    """Write `data`, or its parts one after the other, as `atomic_file` does; returns the path."""
    with atomic_file(path) as temporary, temporary.open("xb") as file:
        file.writelines([data] if isinstance(data, bytes) else data)
    return Path(path)


@contextlib.contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """Yield the name of a file to write, which becomes `path` when the block ends well.

    A reader, or a later run, finds the old file or the new one and never a piece of it. The bytes
    go to a temporary name in the same folder, are synced, and take the final name; the folder is
    synced too, so that the name survives a power cut. Missing parent folders are made.

    Raises:
        OSError: nothing is left behind, and an older file is untouched.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.name}.{secrets.token_hex(4)}.tmp"
    try:
        yield temporary
        _sync(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def write_files(folder: str | Path, contents: Mapping[str, bytes]) -> None:
    """Write each of `contents`, by its path in `folder`, as `write_atomically` does."""
    for name, data in contents.items():
        write_atomically(Path(folder) / name, data)


def clear_unfinished(folder: Path) -> None:
    """Delete what a killed process left of files in `folder`, which nobody writes to now."""
    for left in list(folder.iterdir()):
        if re.fullmatch(r"\..+\.[0-9a-f]{8}\.tmp", left.name) and left.is_file():
            left.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Make the names in `folder` durable, where the file system can sync a folder."""
    with contextlib.suppress(OSError):
        _sync(folder)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


MARKS = {
    "deltafl.json",
    "deltafl_model.json",
    "inspect.json",
    "mask.json",
    "shards.json",
    "statistics.json",
    "suite.json",
    "training.json",
    "record.jsonl",
}
"""Each says that we wrote the folder that holds it."""

WEIGHTS = ("*.safetensors", "pytorch_model*.bin")


def check_output(path: str | Path, *, overwrite: bool) -> None:
    """Raise DeltaflError if `path` exists and may not be replaced: not asked for, or not ours."""
    path = Path(path)
    names = {file.name for file in path.iterdir()} if path.is_dir() else {path.name}
    if not path.exists() or not names:
        return
    if not overwrite:
        raise DeltaflError(f'"{path}" exists; choose another --out, or replace it with --overwrite')
    is_model = "config.json" in names and any(any(path.glob(p)) for p in WEIGHTS)
    if path.is_file() or not (names & MARKS or is_model):
        raise DeltaflError(
            f'"{path}" does not look like a model or a run; --overwrite does not delete it'
        )


@contextlib.contextmanager
def atomic_folder(path: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield an empty folder that becomes `path` when the block ends well, else vanishes.

    With `overwrite` nothing of an older folder survives beside the new. A killed process leaves
    `path` as it was, and a hidden folder beside it, named after the process, that the next call for
    the same path on the same machine removes. (Killed between the two renames of a replacement, it
    leaves no `path`: the next call then puts the old folder back first.)

    Raises:
        DeltaflError: `path` exists and may not be replaced (see `check_output`), also if it came
            into being meanwhile.
    """
    path = Path(path).resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    _clear_abandoned(path)
    check_output(path, overwrite=overwrite)
    owner = f"{platform.node()}-{os.getpid()}"
    temporary = path.parent / f".{path.name}.{owner}-{secrets.token_hex(4)}.tmp"
    temporary.mkdir()
    try:
        yield temporary
        _sync_folder(temporary)
        check_output(path, overwrite=overwrite)
        _replace(path, temporary)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    _sync_folder(path.parent)


def _replace(path: Path, new: Path) -> None:
    """`new` becomes `path`, and what was there is deleted; if that fails, it is there again."""
    old = new.with_suffix(".old.tmp")
    if exists := path.exists():
        os.rename(path, old)
    try:
        os.rename(new, path)
    except BaseException:
        if exists:
            os.rename(old, path)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _clear_abandoned(path: Path) -> None:
    """Undo what killed processes left of `path` here: delete the new, put back the old."""
    start = re.escape(f".{path.name}.{platform.node()}-")
    for left in list(path.parent.iterdir()):
        found = re.fullmatch(start + r"(\d+)-[0-9a-f]{8}(\.old)?\.tmp", left.name)
        if not found or _alive(int(found[1])):
            continue
        if found[2] and not path.exists():
            with contextlib.suppress(FileNotFoundError):  # another run was quicker
                os.rename(left, path)
        else:
            shutil.rmtree(left, ignore_errors=True)


def _alive(process: int) -> bool:
    """Whether a process of this machine runs."""
    try:
        os.kill(process, 0)
    except OSError as error:
        return not isinstance(error, ProcessLookupError)
    return True
