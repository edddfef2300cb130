"""A lazy mapping of tensors -> a Hugging Face directory on disk, streamed, complete or absent."""

import contextlib
import errno
import json
import os
import re
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path

import torch

from deltafl.algebra.streaming import Unit, visit
from deltafl.algebra.tensors import Tensors, lazy
from deltafl.checkpoints.checkpoint import bytes_of, torch_dtype
from deltafl.checkpoints.layout import COMPANIONS, DTYPES, SIZES, Entry
from deltafl.checkpoints.tokenizer import TEXT
from deltafl.errors import DeltaflError
from deltafl.progress import OnProgress, ignore

SYNC = 32
"""Units of work after which what is written is sent to the disk: that and freed memory that is kept
(`pool`) make a merge as fast as it was, a fifth faster than without.
"""

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

INDEX = "model.safetensors.index.json"
_DTYPE = r'("(?:torch_)?dtype"\s*:\s*)(?:"[^"]*"|null)'
NOT_COPIED = frozenset({INDEX, "pytorch_model.bin.index.json", "training.json", "deltafl.json"})


@dataclass(frozen=True)
class Shard:
    """One file to be: its header, its size, and entries, which name it and count from its start."""

    file: Path
    header: bytes
    num_bytes: int
    entries: Mapping[str, Entry]


def plan_shards(
    entries: Mapping[str, Entry], dtype: str | None, max_shard_size: int
) -> list[Shard]:
    """Distribute tensors over files of at most `max_shard_size` bytes; a larger one gets its own.

    dtype: what float tensors are written as, None: as they are. Wider dtypes come first, so that
    every tensor is aligned; otherwise the order is kept.
    """
    kept = {
        n: Entry(dtype if dtype and e.floating else e.dtype, e.shape) for n, e in entries.items()
    }
    groups: list[dict[str, Entry]] = [{}]
    size = 0
    for name, entry in sorted(kept.items(), key=lambda item: -SIZES[item[1].dtype]):
        if groups[-1] and size + entry.num_bytes > max_shard_size:
            groups.append({})
            size = 0
        groups[-1][name] = entry
        size += entry.num_bytes
    count = f"{len(groups):05d}"
    files = [f"model-{i:05d}-of-{count}.safetensors" for i in range(1, len(groups) + 1)]
    files = files if len(groups) > 1 else ["model.safetensors"]
    return [_shard(Path(file), group) for file, group in zip(files, groups, strict=True)]


def _shard(file: Path, entries: Mapping[str, Entry]) -> Shard:
    stops = [*accumulate((entry.num_bytes for entry in entries.values()), initial=0)]
    spans = dict(zip(entries, pairwise(stops), strict=True))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    for name, entry in entries.items():
        header[name] = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": spans[name]}
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    raw = len(raw).to_bytes(8, "little") + raw
    placed = {
        name: Entry(entry.dtype, entry.shape, file, len(raw) + spans[name][0])
        for name, entry in entries.items()
    }
    return Shard(file, raw, len(raw) + stops[-1], placed)


def write_tensors(
    tensors: Tensors,
    shards: Sequence[Shard],
    folder: Path,
    *,
    threads: int,
    on_progress: OnProgress = ignore,
) -> None:
    """Compute and write all tensors, block by block, each where it belongs; then sync the files.

    Raises:
        DeltaflError: the disk is full.
        OSError: the disk fails.
    """
    source = lazy(tensors)
    entries = {name: entry for shard in shards for name, entry in shard.entries.items()}
    with _reserved(shards, folder) as handles:

        def write(unit: Unit) -> None:
            for name, start, stop in unit:
                entry = entries[name]
                block = torch.empty(stop - start, dtype=torch_dtype(entry.dtype))
                source.read(name, start, stop, block)
                data, at = bytes_of(block), entry.start + start * SIZES[entry.dtype]
                while len(data):
                    count = os.pwrite(handles[entry.file], data, at)
                    data, at = data[count:], at + count

        passed = visit(
            {name: source.spec(name) for name in source},
            write,
            threads,
            whole=source.whole,
            name="writing",
            on_progress=on_progress,
        )

        def sync() -> None:
            for handle in handles.values():
                os.fsync(handle)

        # nobody writes once it is left; the disk writes what is there while the next is computed
        with contextlib.closing(passed), ThreadPoolExecutor(1) as background:
            for number, _ in enumerate(passed, 1):
                if number % SYNC == 0:
                    background.submit(sync)
        sync()
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(entry.num_bytes for entry in entries.values())},
            "weight_map": {name: entry.file.name for name, entry in entries.items()},
        }
        (folder / INDEX).write_text(json.dumps(index, indent=2))


@contextlib.contextmanager
def _reserved(shards: Sequence[Shard], folder: Path) -> Iterator[dict[Path, int]]:
    """File -> handle of the shards, open, with their headers.

    Their space is reserved, so that a full disk is found before the work.
    """
    handles: dict[Path, int] = {}
    try:
        for shard in shards:
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL
            handles[shard.file] = handle = os.open(folder / shard.file, flags, 0o644)
            if sys.platform == "linux":
                os.posix_fallocate(handle, 0, shard.num_bytes)
            os.pwrite(handle, shard.header, 0)
        yield handles
    except OSError as error:
        if error.errno not in FULL:
            raise
        need = sum(shard.num_bytes for shard in shards)
        raise DeltaflError(
            f'"{folder.parent}": cannot hold the {need:,} bytes of the result ({error.strerror}); '
            "free some space, choose another --out, or lower --max-shard-size"
        ) from None
    finally:
        for handle in handles.values():
            os.close(handle)


def companions(source: Path) -> list[Path]:
    """Configuration, processor and code of a model, not what makes its text (`text_files`)."""
    return [
        file
        for file in source.iterdir()
        if file.is_file() and file.suffix in COMPANIONS and file.name not in NOT_COPIED
        if not TEXT.fullmatch(file.name)
    ]


def copy_files(files: Iterable[Path], target: Path, dtype: str | None) -> None:
    """Copy what belongs beside new weights.

    A new dtype is written wherever config.json names one, by transformers 4's key or 5's.
    """
    for file in files:
        shutil.copyfile(file, target / file.name)
    file = target / "config.json"
    if dtype and file.exists():
        named = re.sub(_DTYPE, rf'\1"{DTYPES[dtype]}"', file.read_text())
        file.write_text(named)
