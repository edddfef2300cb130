"""Arrays on disk: written once, complete or not at all, memory-mapped ever after.

An entry is an .npy file, named by the sha256 of what it is made of, and beside it a .json file, written
last, with what there is to say about the array and the stamp of its file. Files are known by their
stamps, as `datasets` and `make` know them, so that a warm start reads no image twice.
"""

import hashlib
import io
import json
import logging
import os
from collections.abc import Callable, Iterable, Mapping
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from deltafl.errors import DeltaflError
from deltafl.files import write_atomically

log = logging.getLogger(__name__)

FORMAT = 2
"""Raise it when the bytes that an entry should hold change: old entries are then not found."""


class Made(NamedTuple):
    """What an entry will hold: JSON about it, and an array in parts along its first axis."""

    about: dict[str, Any]
    shape: tuple[int, ...]
    parts: Iterable[np.ndarray]
    dtype: str = "uint8"


def stamps(files: Iterable[Path]) -> list[list[Any]]:
    """Path, size and modification time of each file: other content has another stamp."""
    stats = [(str(path.resolve()), path.stat()) for path in files]
    return [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]


def kept(made_of: Mapping[str, Any], make: Callable[[Path], Made]) -> tuple[dict[str, Any], Tensor]:
    """What `make(scratch)` gives, its array memory-mapped: out of the cache, `$DELTAFL_CACHE` or else
    `~/.cache/deltafl`, if it was made of the same before. `scratch` is a folder that lasts until the
    array is written. No write into the tensor reaches the file.

    Raises:
        DeltaflError: the cache folder cannot be written.
    """
    folder = Path(os.environ.get("DELTAFL_CACHE") or Path.home() / ".cache" / "deltafl")
    key = json.dumps({**made_of, "format": FORMAT}, sort_keys=True).encode()
    file = folder / f"{hashlib.sha256(key).hexdigest()}.npy"
    if (found := _read(file)) is not None:
        return found
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=folder) as scratch:
            made, header = make(Path(scratch)), io.BytesIO()
            form = {"descr": np.dtype(made.dtype).str, "fortran_order": False, "shape": made.shape}
            np.lib.format.write_array_header_1_0(header, form)
            parts = (np.ascontiguousarray(part).data for part in made.parts)
            write_atomically(file, chain([header.getvalue()], parts))
        about = {"about": made.about, "stamp": stamps([file])[0][1:]}
        write_atomically(file.with_suffix(".json"), json.dumps(about).encode())
    except OSError as error:
        raise DeltaflError(
            f'cache folder "{folder}" cannot be written: {error.strerror or error}. '
            "Free some space, or name another folder in DELTAFL_CACHE."
        ) from error
    log.info("made %s", file)
    return made.about, _mapped(file)


def _read(file: Path) -> tuple[dict[str, Any], Tensor] | None:
    """An entry; None where there is none or not an intact one."""
    if not (beside := file.with_suffix(".json")).exists():
        return None
    try:
        kept = json.loads(beside.read_text())
        if kept["stamp"] != stamps([file])[0][1:]:
            raise ValueError("not the file that was written")
        return kept["about"], _mapped(file)
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.warning("%s is damaged (%s); it is made again", file, error)
        return None


def _mapped(file: Path) -> Tensor:
    """Copy-on-write: torch wants writable memory, and nobody's write may reach the file."""
    return torch.from_numpy(np.load(file, mmap_mode="c"))
