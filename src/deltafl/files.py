"""Files that are whole or absent, whatever kills the process."""

import contextlib
import os
import re
import secrets
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from deltafl.errors import DeltaflError

if sys.platform != "win32":
    import fcntl


def write_atomically(path: str | Path, data: bytes | Iterable[bytes | memoryview]) -> Path:
    """Write `data`, or its parts one after the other, to `path` as `atomic_file` does; returns the path."""
    with atomic_file(path) as temporary, temporary.open("xb") as file:
        file.writelines([data] if isinstance(data, bytes) else data)
    return Path(path)


@contextlib.contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """Yield the name of a file to write, which becomes `path` when the block ends well: a reader, or a
    later run, finds the old file or the new one and never a piece of it.

    The bytes go to a temporary name in the same folder, are synced, and take the final name; the folder is synced
    too, so that the name survives a power cut. Missing parent folders are made.

    Raises:
        OSError: nothing is left behind, and an older file is untouched.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.name}.{secrets.token_hex(4)}.tmp"
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_files(folder: str | Path, contents: Mapping[str, bytes]) -> None:
    """Write each of `contents`, by its path in `folder`, as `write_atomically` does."""
    for name, data in contents.items():
        write_atomically(Path(folder) / name, data)


def clear_unfinished(folder: Path) -> None:
    """Delete what a killed process left of the files that it was writing into `folder`, which nobody writes to now."""
    for left in list(folder.iterdir()):
        if re.fullmatch(r"\..+\.[0-9a-f]{8}\.tmp", left.name) and left.is_file():
            left.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` durable; a file system that cannot sync a folder is left to its own guarantees."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


MARKS = (
    "deltafl.json",
    "deltafl_model.json",
    "inspect.json",
    "mask.json",
    "shards.json",
    "suite.json",
    "training.json",
    "record.jsonl",
)
WEIGHTS = ("*.safetensors", "pytorch_model*.bin")


def check_output(path: str | Path, *, overwrite: bool) -> None:
    """Raise DeltaflError if `path` exists and may not be replaced: not asked for, or not a folder of ours."""
    path = Path(path)
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    if not overwrite:
        raise DeltaflError(f'"{path}" exists; choose another --out, or replace it with --overwrite')
    if not _replaceable(path):
        raise DeltaflError(
            f'"{path}" does not look like a model or a run; --overwrite does not delete it'
        )


def _replaceable(path: Path) -> bool:
    """Whether a path is a folder that we wrote, or a model of transformers: other tools have a config.json too."""
    if not path.is_dir():
        return False
    weights = any(next(path.glob(pattern), None) for pattern in WEIGHTS)
    return any((path / mark).is_file() for mark in MARKS) or (
        weights and (path / "config.json").is_file()
    )


@contextlib.contextmanager
def atomic_folder(path: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield an empty folder that becomes `path` when the block ends well, and vanishes when it does not.

    With `overwrite` nothing of an older folder survives beside the new. A killed process leaves `path` as it was, and
    a hidden folder beside it that the next call for the same path removes, on whichever machine. (Killed between the
    two renames of a replacement, it leaves no `path`: the next call then puts the old folder back first.)

    Raises:
        DeltaflError: `path` exists and may not be replaced (see `check_output`), also if it came into being meanwhile.
    """
    path = Path(path).resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    _clear_abandoned(path)
    check_output(path, overwrite=overwrite)
    temporary = path.parent / f".{path.name}.{secrets.token_hex(4)}.tmp"
    temporary.mkdir()
    with _claimed(temporary):
        try:
            yield temporary
            sync_folder(temporary)
            check_output(path, overwrite=overwrite)
            if path.exists():
                _exchange(temporary, path)
            else:
                os.rename(temporary, path)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    sync_folder(path.parent)


@contextlib.contextmanager
def _claimed(folder: Path) -> Iterator[bool]:
    """Hold a folder while the block, or this process, lasts; False where another process, here or elsewhere, holds it,
    and where the system or its disk does not know such claims. Forked processes do not hold it.
    """
    if sys.platform == "win32":
        yield False
        return
    handle = os.open(folder, os.O_RDONLY)
    _claims.add(handle)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            claimed = True
        except OSError:
            claimed = False
        yield claimed
    finally:
        if handle in _claims:
            _claims.discard(handle)
            os.close(handle)


def _drop_claims() -> None:
    """In a forked process: it shares the locks, and would hold them for a moment after its parent was killed."""
    while _claims:
        os.close(_claims.pop())


_claims: set[int] = set()
if sys.platform != "win32":
    os.register_at_fork(after_in_child=_drop_claims)


def _exchange(new: Path, path: Path) -> None:
    """`new` becomes `path`, and what was there is deleted; if that fails, what was there is there again."""
    old = new.with_suffix(".old.tmp")
    with _claimed(path):
        os.rename(path, old)
        try:
            os.rename(new, path)
        except BaseException:
            os.rename(old, path)
            raise
        shutil.rmtree(old, ignore_errors=True)


def _clear_abandoned(path: Path) -> None:
    """Undo what killed processes left behind while they wrote `path`: delete the new, put back the old."""
    ours = re.compile(re.escape(f".{path.name}.") + r"[0-9a-f]{8}(\.old)?\.tmp")
    for left in list(path.parent.iterdir()):
        found = ours.fullmatch(left.name)
        if not found:
            continue
        with contextlib.suppress(FileNotFoundError), _claimed(left) as claimed:
            if not claimed:
                continue
            if found[1] and not path.exists():
                os.rename(left, path)
            else:
                shutil.rmtree(left, ignore_errors=True)
