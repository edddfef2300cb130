"""A lazy mapping of tensors -> a Hugging Face directory on disk, streamed, complete or absent."""

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from deltafl.algebra.streaming import Unit, visit
from deltafl.algebra.tensors import Tensors, lazy
from deltafl.checkpoints.checkpoint import DTYPES
from deltafl.checkpoints.layout import COMPANIONS, SIZES, Entry
from deltafl.errors import DeltaflError
from deltafl.progress import OnProgress, ignore

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
SYNC = 1 << 26
"""Elements after which what has been written is sent to the disk, while the next blocks are computed."""

INDEX = "model.safetensors.index.json"
NOT_COPIED = frozenset({INDEX, "pytorch_model.bin.index.json", "training.json", "deltafl.json"})


@dataclass(frozen=True)
class Shard:
    """One file to be: its entries, whose offsets count from the start of the file."""

    file: str
    header: bytes
    entries: Mapping[str, Entry]
    num_bytes: int


def plan_shards(
    entries: Mapping[str, Entry], dtype: str | None, max_shard_size: int
) -> list[Shard]:
    """Distribute tensors over files of at most `max_shard_size` bytes (a larger tensor gets a file of its own).

    dtype: what float tensors are written as, None: as they are. Wider dtypes come first, so that every tensor is
    aligned; otherwise the order is kept.
    """
    kept = {n: dtype if dtype and e.floating else e.dtype for n, e in entries.items()}
    names = sorted(entries, key=lambda n: -SIZES[kept[n]])
    groups: list[list[str]] = [[]]
    held = 0
    for name in names:
        size = entries[name].numel * SIZES[kept[name]]
        if groups[-1] and held + size > max_shard_size:
            groups.append([])
            held = 0
        groups[-1].append(name)
        held += size
    single = len(groups) == 1
    return [
        _shard(
            "model.safetensors" if single else f"model-{i:05d}-of-{len(groups):05d}.safetensors",
            group,
            entries,
            kept,
        )
        for i, group in enumerate(groups, 1)
    ]


def _shard(
    file: str, names: Sequence[str], entries: Mapping[str, Entry], dtypes: Mapping[str, str]
) -> Shard:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at, spans = 0, {}
    for name in names:
        size = entries[name].numel * SIZES[dtypes[name]]
        spans[name] = (at, at + size)
        header[name] = {
            "dtype": dtypes[name],
            "shape": list(entries[name].shape),
            "data_offsets": [at, at + size],
        }
        at += size
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    start = 8 + len(raw)
    placed = {
        n: Entry(dtypes[n], entries[n].shape, Path(file), start + a, start + b)
        for n, (a, b) in spans.items()
    }
    return Shard(file, len(raw).to_bytes(8, "little") + raw, placed, start + at)


def write_tensors(
    tensors: Tensors,
    shards: Sequence[Shard],
    folder: Path,
    *,
    threads: int,
    on_progress: OnProgress = ignore,
) -> None:
    """Compute and write all tensors, block by block, each block where it belongs; then sync the files.

    Space is reserved first, so that a full disk is found before the work.

    Raises:
        DeltaflError: the disk is full.
        OSError: the disk fails.
    """
    handles: dict[Path, int] = {}
    try:
        for shard in shards:
            handle = os.open(folder / shard.file, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
            handles[Path(shard.file)] = handle
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(handle, 0, shard.num_bytes)
            os.pwrite(handle, shard.header, 0)
        entries = {name: entry for shard in shards for name, entry in shard.entries.items()}
        source = lazy(tensors)

        def write(unit: Unit) -> None:
            for name, start, stop in unit:
                entry = entries[name]
                block = torch.empty(stop - start, dtype=DTYPES[entry.dtype])
                source.read(name, start, stop, block)
                data = memoryview(block.view(torch.uint8).numpy())  # type: ignore[arg-type]
                _write_all(handles[entry.file], data, entry.start + start * SIZES[entry.dtype])

        specs = {name: source.spec(name) for name in source}
        passed = visit(
            specs, write, threads, whole=source.whole, name="writing", on_progress=on_progress
        )
        with ThreadPoolExecutor(1) as background:
            sent, unsent = Future[None](), 0
            sent.set_result(None)
            with contextlib.closing(passed):  # nobody writes once it is left
                for unit, _ in passed:
                    unsent += sum(stop - start for _, start, stop in unit)
                    if unsent >= SYNC and sent.done():
                        sent.result()
                        sent, unsent = background.submit(_sync, handles.values()), 0
            sent.result()
        _sync(handles.values())
    except OSError as error:
        if error.errno not in FULL:
            raise
        remedy = (
            "lower --max-shard-size"
            if error.errno == errno.EFBIG
            else "free some space, or choose another --out"
        )
        need = sum(shard.num_bytes for shard in shards)
        raise DeltaflError(
            f'"{folder.parent}": cannot hold the {need:,} bytes of the result ({error.strerror}); {remedy}'
        ) from None
    finally:
        for handle in handles.values():
            os.close(handle)
    if len(shards) > 1:
        weight_map = {n: s.file for s in shards for n in s.entries}
        total = sum(e.stop - e.start for s in shards for e in s.entries.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2))


def _sync(handles: Collection[int]) -> None:
    for handle in handles:
        os.fsync(handle)


def _write_all(handle: int, data: memoryview, at: int) -> None:
    while len(data):
        count = os.pwrite(handle, data, at)
        data, at = data[count:], at + count


def companions(folder: Path) -> list[Path]:
    """The configuration, tokenizer, processor and code files of a model folder: what is copied beside new weights."""
    return sorted(
        f
        for f in folder.iterdir()
        if f.is_file() and f.suffix in COMPANIONS and f.name not in NOT_COPIED
    )


def copy_companions(source: Path, target: Path, dtype: str | None) -> None:
    """Copy a model folder's companions; with a new dtype, config.json says so."""
    for file in companions(source):
        shutil.copyfile(file, target / file.name)
    config = target / "config.json"
    if dtype and config.exists():
        try:
            held = json.loads(config.read_text())
        except ValueError:
            held = None
        if not isinstance(held, dict):
            raise DeltaflError(
                f'"{source / config.name}": is not a JSON object; mend it, or leave out --dtype'
            )
        told = str(DTYPES[dtype]).removeprefix("torch.")
        config.write_text(json.dumps({**_without_dtype(held), "dtype": told}, indent=2))


def _without_dtype(config: dict[str, object]) -> dict[str, object]:
    """A configuration without its dtype, under the name of transformers 4 or 5, in its parts for towers too."""
    return {
        key: _without_dtype(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if key not in ("dtype", "torch_dtype")
    }
