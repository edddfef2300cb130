"""Arrays on disk: written once, complete or not at all, memory-mapped ever after.

An entry is a .safetensors file, named by the sha256 of what it is made of: an array and, as
metadata, what there is to say about it. The files it was made of are known by their stamps, as
`datasets` and `make` know them, so that a warm start reads no image twice.
"""

import hashlib
import json
import logging
import math
import os
from collections.abc import Callable, Iterable, Mapping
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple, TypeAlias

import numpy as np
from safetensors import SafetensorError, safe_open
from torch import Tensor

from deltafl.checkpoints.layout import SIZES
from deltafl.errors import DeltaflError
from deltafl.files import write_atomically

log = logging.getLogger(__name__)

FORMAT = 3
"""Raise it when the bytes that an entry should hold change: old entries are then not found."""

About: TypeAlias = Mapping[str, list]
"""What there is to say about an array: lists that JSON can hold."""


class Made(NamedTuple):
    """What an entry will hold: an array in parts along its first axis."""

    about: About
    shape: tuple[int, ...]
    parts: Iterable[np.ndarray]
    dtype: str = "U8"


def stamps(files: Iterable[Path]) -> list[tuple[str, int, int]]:
    """Path, size and modification time of each file: other content has another stamp."""
    stats = [(str(path.resolve()), path.stat()) for path in files]
    return [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]


def kept(made_of: Mapping[str, object], make: Callable[[Path], Made]) -> tuple[About, Tensor]:
    """What `make(scratch)` gives, its array memory-mapped: out of the cache, `$DELTAFL_CACHE` or
    else `~/.cache/deltafl`, if it was made of the same before. `scratch` is a folder that lasts
    until the array is written. No write into the tensor reaches the file.

    Raises:
        DeltaflError: the cache folder cannot be written.
    """
    folder = Path(os.environ.get("DELTAFL_CACHE") or Path.home() / ".cache" / "deltafl")
    key = json.dumps({**made_of, "format": FORMAT}, sort_keys=True).encode()
    file = folder / f"{hashlib.sha256(key).hexdigest()}.safetensors"
    if file.exists():
        try:
            return _read(file)
        except (OSError, SafetensorError) as error:
            log.warning("%s is damaged (%s); it is made again", file, error)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=folder) as scratch:
            made = make(Path(scratch))
            size = math.prod(made.shape) * SIZES[made.dtype]
            array = {"dtype": made.dtype, "shape": made.shape, "data_offsets": [0, size]}
            about = {"about": json.dumps(made.about)}
            header = json.dumps({"__metadata__": about, "array": array}).encode()
            header += b" " * (-len(header) % 8)
            parts = (np.ascontiguousarray(part).data for part in made.parts)
            write_atomically(file, chain([len(header).to_bytes(8, "little"), header], parts))
    except OSError as error:
        raise DeltaflError(
            f'cache folder "{folder}" cannot be written: {error.strerror or error}. '
            "Free some space, or name another folder in DELTAFL_CACHE."
        ) from error
    log.info("made %s", file)
    return _read(file)


def _read(file: Path) -> tuple[About, Tensor]:
    with safe_open(file, "pt") as opened:
        return json.loads(opened.metadata()["about"]), opened.get_tensor("array")
