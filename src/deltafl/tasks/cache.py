"""Decoded tasks on disk: written once, complete or not at all, memory-mapped ever after.

An entry is a folder named by the sha256 of what it holds (content of the source, geometry, selection of rows). It
is built under a temporary name and renamed when all of it is on disk; `entry.json` lists the sha256 of every array,
and an array is read only after that was checked. A check is remembered by path, size and modification time, so a
warm start reads no image twice.
"""

import hashlib
import io
import itertools
import json
import logging
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from deltafl.errors import DeltaflError
from deltafl.files import sync_folder, write_atomically
from deltafl.tasks.arrays import Split, Task

log = logging.getLogger(__name__)

SPLITS = ("train", "val", "test")


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
    stats = [path.stat() for path in paths]
    seen = key_of(
        {"files": [(str(p), s.st_size, s.st_mtime_ns) for p, s in zip(paths, stats, strict=True)]}
    )
    memo = cache_dir / "hashes" / seen
    if memo.is_file() and len(known := memo.read_text()) == 64:
        return known
    root = os.path.commonpath([path.parent for path in paths])
    digests = {}
    for path in paths:
        try:
            with path.open("rb") as file:
                digests[os.path.relpath(path, root)] = hashlib.file_digest(
                    file, "sha256"
                ).hexdigest()
        except OSError as error:
            raise DeltaflError(
                f'"{path}" cannot be read: {error.strerror}. Check its permissions.'
            ) from error
    total = key_of(digests)
    write_atomically(memo, total.encode())
    return total


def read(cache_dir: Path, key: str) -> Task | None:
    """The task of an entry, its images memory-mapped; None where there is no entry or not an intact one."""
    entry = cache_dir / key
    if not entry.is_dir():
        return None
    try:
        about = json.loads((entry / "entry.json").read_text())
        if content_hash([entry / name for name in about["files"]], cache_dir) != key_of(
            about["files"]
        ):
            raise ValueError("not the bytes that were written")
        splits = {split: _read_split(entry, split) for split in SPLITS}
        return Task(about["name"], **splits, class_names=tuple(about["class_names"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, DeltaflError) as error:
        log.warning("cache entry %s is damaged (%s); it is made again", entry, error)
        shutil.rmtree(entry)
        return None


def _read_split(entry: Path, split: str) -> Split:
    # Copy-on-write: torch wants writable memory, and nobody's write may reach the file.
    images = np.load(entry / f"{split}_images.npy", mmap_mode="c")
    return Split(torch.from_numpy(images), torch.from_numpy(np.load(entry / f"{split}_labels.npy")))


def write(
    cache_dir: Path,
    key: str,
    name: str,
    class_names: tuple[str, ...],
    splits: Mapping[str, tuple[np.ndarray, Iterable[np.ndarray]]],
    shape: tuple[int, int, int],
) -> None:
    """Store a task: `splits` maps each of "train", "val", "test" to labels int64 (N,) and batches uint8 (n, *shape).

    Another process that makes the same entry at the same time does no harm: the first one to finish stays.

    Raises:
        DeltaflError: the cache folder cannot be written.
    """
    with writing_to(cache_dir), TemporaryDirectory(dir=cache_dir) as temporary:
        entry = Path(temporary) / "entry"
        entry.mkdir()
        files = {}
        for split, (labels, batches) in splits.items():
            for file, length, item, parts in (
                (f"{split}_labels.npy", labels.shape, np.int64, [labels]),
                (f"{split}_images.npy", (len(labels), *shape), np.uint8, batches),
            ):
                files[file] = _write_array(entry / file, length, np.dtype(item), parts)
        about = {"name": name, "class_names": class_names, "files": files}
        write_atomically(entry / "entry.json", json.dumps(about, indent=1).encode())
        try:
            os.rename(entry, cache_dir / key)
        except OSError:
            if not (cache_dir / key).is_dir():
                raise
        sync_folder(cache_dir)


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


def _write_array(
    path: Path, shape: tuple[int, ...], dtype: np.dtype, batches: Iterable[np.ndarray]
) -> str:
    """Write an .npy file batch by batch, sync it, and return its sha256."""
    header = io.BytesIO()
    descr = np.lib.format.dtype_to_descr(dtype)
    np.lib.format.write_array_header_1_0(
        header, {"descr": descr, "fortran_order": False, "shape": shape}
    )
    digest = hashlib.sha256()
    # Plain writes: a disk that fills up under a memory map kills the process instead of raising.
    with path.open("wb") as file:
        for part in itertools.chain(
            [header.getvalue()], (np.ascontiguousarray(b).data for b in batches)
        ):
            digest.update(part)
            file.write(part)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()
