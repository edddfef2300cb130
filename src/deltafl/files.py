"""Files that are whole or absent, whatever kills the process."""

import contextlib
import glob
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from deltafl.errors import DeltaflError


def write_atomically(path: str | Path, data: bytes) -> Path:
    """Write `data` to `path` so that a reader, or a later run, finds the old file or the new one and never a part.

    The bytes go to a temporary name in the same folder, are synced, and take the final name; the folder is synced
    too, so that the name survives a power cut. Missing parent folders are made. Returns the path.

    Raises:
        OSError: nothing is left behind, and an older file is untouched.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.name}.{secrets.token_hex(4)}.tmp"
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)
    return path


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` durable; a file system that cannot sync a folder is left to its own guarantees."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


MARKS = ("config.json", "deltafl.json", "deltafl_model.json", "training.json", "record.jsonl")


def check_output(path: str | Path, *, overwrite: bool) -> None:
    """Raise DeltaflError if `path` exists and may not be replaced: not asked for, or not a folder of ours."""
    path = Path(path)
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    if not overwrite:
        raise DeltaflError(f'"{path}" exists; choose another --out, or replace it with --overwrite')
    if not path.is_dir() or not any((path / mark).exists() for mark in MARKS):
        raise DeltaflError(f'"{path}" does not look like a model or a run; --overwrite does not delete it')


@contextlib.contextmanager
def atomic_folder(path: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield an empty folder that becomes `path` when the block ends well, and vanishes when it does not.

    With `overwrite` nothing of an older folder survives beside the new. A killed process leaves `path` as it was, and
    a hidden folder beside it that the next call for the same path removes.

    Raises:
        DeltaflError: `path` exists and may not be replaced (see `check_output`).
    """
    path = Path(path).absolute()
    check_output(path, overwrite=overwrite)
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(path)
    temporary = path.parent / f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp"
    temporary.mkdir()
    try:
        yield temporary
        sync_folder(temporary)
        if path.exists():
            old = temporary.with_suffix(".old.tmp")
            os.rename(path, old)
            os.rename(temporary, path)
            shutil.rmtree(old)
        else:
            os.rename(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync_folder(path.parent)


def _remove_abandoned(path: Path) -> None:
    """Delete what killed processes left behind while they wrote `path`."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        owner = left.name.removeprefix(f".{path.name}.").split(".")[0]
        if owner.isdigit() and not Path(f"/proc/{owner}").exists() and Path("/proc/self").exists():
            shutil.rmtree(left, ignore_errors=True)
