"""Arrays on disk: written once, complete or not at all, memory-mapped ever after.

An entry is a folder named by the sha256 of what its arrays are made of. It is built under a
temporary name and renamed when all of it is on disk; `entry.json` holds the sha256 of the arrays,
which are read only after that was checked. A check is remembered by path, size and modification
time, so a warm start reads no image twice.
"""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np

from deltafl.errors import DeltaflError
from deltafl.files import sync_folder, write_atomically

log = logging.getLogger(__name__)

FORMAT = 2
"""Raise it when the bytes that an entry should hold change: old entries are then not found."""


class Array(NamedTuple):
    """An array that comes in parts along its first axis."""

    shape: tuple[int, ...]
    dtype: type[np.generic]
    parts: Iterable[np.ndarray]


Made = tuple[dict[str, Any], Mapping[str, Array]]
"""What can be written as JSON, and arrays by name, none of them empty."""


def default_cache_dir() -> Path:
    """`$DELTAFL_CACHE`, else `~/.cache/deltafl`."""
    return Path(os.environ.get("DELTAFL_CACHE") or Path.home() / ".cache" / "deltafl")


def key_of(parts: Mapping[str, Any]) -> str:
    """sha256 over named parts: for an entry's name, everything that decides its bytes."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def content_hash(files: Sequence[Path], cache_dir: Path) -> str:
    """sha256 over the names (below their common folder) and bytes of `files`.

    Remembered under `cache_dir` by path, size and modification time of all of them.

    Raises:
        DeltaflError: a file cannot be read.
    """
    paths = [path.resolve() for path in files]
    seen = [(str(p), s.st_size, s.st_mtime_ns) for p in paths for s in [p.stat()]]
    memo = cache_dir / "hashes" / key_of({"files": seen})
    if memo.is_file() and len(known := memo.read_text()) == 64:
        return known
    total = _hash(paths)
    write_atomically(memo, total.encode())
    return total


def _hash(paths: Sequence[Path]) -> str:
    root = os.path.commonpath([path.parent for path in paths])
    digests = {}
    for path in paths:
        try:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise DeltaflError(
                f'"{path}" cannot be read: {error.strerror}. Check its permissions.'
            ) from error
        digests[os.path.relpath(path, root)] = digest
    return key_of(digests)


def kept(
    parts: Mapping[str, Any], make: Callable[[Path], Made]
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """What `make(scratch)` gives, its arrays memory-mapped: out of the cache, if it was made of the
    same `parts` before. `scratch` is a folder that lasts until the arrays are written.

    Another process that makes the same entry at the same time does no harm: the first stays.

    Raises:
        DeltaflError: the cache folder cannot be written, or does not give back what was written.
    """
    folder = default_cache_dir()
    entry = folder / key_of({**parts, "format": FORMAT})
    if (found := _read(entry, folder)) is None:
        with writing_to(folder), TemporaryDirectory(dir=folder) as temporary:
            scratch, new = Path(temporary) / "scratch", Path(temporary) / "entry"
            scratch.mkdir()
            new.mkdir()
            _write(new, *make(scratch))
            try:
                os.rename(new, entry)
            except OSError:
                if not entry.is_dir():
                    raise
            sync_folder(folder)
        log.info("made %s", entry)
        found = _read(entry, folder)
    if found is None:
        raise DeltaflError(
            f'cache folder "{folder}" does not give back what was written. Is the disk failing?'
        )
    return found


def _read(entry: Path, folder: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]] | None:
    """An entry; None where there is none or not an intact one."""
    if not entry.is_dir():
        return None
    try:
        kept = json.loads((entry / "entry.json").read_text())
        if content_hash(sorted(entry.glob("*.npy")), folder) != kept["sha256"]:
            raise ValueError("not the bytes that were written")
        # Copy-on-write: torch wants writable memory, and nobody's write may reach the file.
        arrays = {p.stem: np.load(p, mmap_mode="c") for p in entry.glob("*.npy")}
        return kept["about"], arrays
    except (OSError, ValueError, KeyError, TypeError, DeltaflError) as error:
        log.warning("cache entry %s is damaged (%s); it is made again", entry, error)
        shutil.rmtree(entry)
        return None


def _write(entry: Path, about: dict[str, Any], arrays: Mapping[str, Array]) -> None:
    for name, array in arrays.items():
        header = {"descr": np.dtype(array.dtype).str, "fortran_order": False, "shape": array.shape}
        # Plain writes: a disk that fills up under a memory map kills the process instead of raising.
        with (entry / f"{name}.npy").open("wb") as file:
            np.lib.format.write_array_header_1_0(file, header)
            for part in array.parts:
                file.write(np.ascontiguousarray(part).data)
            file.flush()
            os.fsync(file.fileno())
    kept = {"about": about, "sha256": _hash(sorted(entry.glob("*.npy")))}
    write_atomically(entry / "entry.json", json.dumps(kept).encode())


@contextmanager
def writing_to(cache_dir: Path) -> Iterator[None]:
    """Make the cache folder; a full disk or a folder that cannot be written is a `DeltaflError`."""
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise DeltaflError(
            f'cache folder "{cache_dir}" cannot be written: {error.strerror or error}. '
            "Free some space, or name another folder in DELTAFL_CACHE."
        ) from error
