"""Arrays on disk: written once, complete or not at all, memory-mapped ever after.

An entry is a .json file, named by the sha256 of what it is made of, with what there is to say about
an array, and beside it the array's bytes, written first. The files it was made of are known by
their stamps, as `datasets` and `make` know them, so that a warm start reads no image twice.
"""

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from deltafl.errors import DeltaflError
from deltafl.files import write_atomically

log = logging.getLogger(__name__)

FORMAT = 4
"""Raise it when the bytes that an entry should hold change: old entries are then not found."""


class Made(NamedTuple):
    """What an entry will hold: an array in parts along its first axis, of numpy's dtype, and what
    there is to say about it, as JSON can hold it.
    """

    about: list
    shape: tuple[int, ...]
    parts: Iterable[np.ndarray]
    dtype: str = "uint8"


def stamps(files: Iterable[Path]) -> list[tuple[str, int, int]]:
    """Path, size and modification time of each file: other content has another stamp."""
    stats = [(str(path.resolve()), path.stat()) for path in files]
    return [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]


def kept(made_of: object, make: Callable[[Path], Made]) -> tuple[list, Tensor]:
    """What `make(scratch)` gives, its array memory-mapped: out of the cache, `$DELTAFL_CACHE` or
    else `~/.cache/deltafl`, if it was made of the same, as JSON, before. `scratch` is a folder that
    lasts until the array is written. No write into the tensor reaches the file.

    Raises:
        DeltaflError: the cache folder cannot be written.
    """
    folder = Path(os.environ.get("DELTAFL_CACHE") or Path.home() / ".cache" / "deltafl")
    key = json.dumps([made_of, FORMAT]).encode()
    file = folder / f"{hashlib.sha256(key).hexdigest()}.json"
    if file.exists():
        try:
            return _read(file)
        except (OSError, ValueError) as error:
            log.warning("%s is damaged (%s); it is made again", file, error)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=folder) as scratch:
            about, shape, parts, dtype = make(Path(scratch))
            data = (np.ascontiguousarray(part).data for part in parts)
            write_atomically(file.with_suffix(".bin"), data)
            write_atomically(file, json.dumps([about, dtype, shape]).encode())
    except OSError as error:
        raise DeltaflError(
            f'cache folder "{folder}" cannot be written: {error.strerror or error}. '
            "Free some space, or name another folder in DELTAFL_CACHE."
        ) from error
    log.info("made %s", file)
    return _read(file)


def _read(file: Path) -> tuple[list, Tensor]:
    about, dtype, shape = json.loads(file.read_text())
    array = np.memmap(file.with_suffix(".bin"), dtype, "c", shape=tuple(shape))
    return about, torch.from_numpy(array)
