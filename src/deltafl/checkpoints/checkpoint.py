"""Checkpoints as lazy mappings of named tensors: read by blocks, never whole; and the lazy difference of two."""

import os
import pickle
import re
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deltafl.algebra.tensors import (
    Tensors,
    block_of,
    blocks,
    device_of,
    numel_of,
    read_into,
    shape_of,
)
from deltafl.checkpoints import layout as layouts
from deltafl.checkpoints.align import Alignment
from deltafl.checkpoints.layout import SIZES, Entry, Layout
from deltafl.errors import DeltaflError, shorten

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64, "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Checkpoint(Mapping[str, Tensor]):
    """A checkpoint on disk. `checkpoint[name]` reads one tensor, `block` a part of one, in the file's dtype.

    Reads with pread rather than mmap: memory is what is asked for, and a file that shrinks while it is read is an
    error instead of a dead process.
    """

    fresh_blocks = True

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self._files: dict[Path, int] = {}
        self._local = threading.local()
        for file in layout.files:
            self._files[file] = os.open(file, os.O_RDONLY)

    def __iter__(self) -> Iterator[str]:
        return iter(self.layout.entries)

    def __len__(self) -> int:
        return len(self.layout.entries)

    def __contains__(self, name: object) -> bool:
        return name in self.layout.entries

    def __getitem__(self, name: str) -> Tensor:
        entry = self.layout.entries[name]
        return self.block(name, 0, entry.numel).reshape(entry.shape)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one tensor."""
        return self.layout.entries[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of one tensor."""
        return DTYPES[self.layout.entries[name].dtype]

    def block(self, name: str, start: int, stop: int) -> Tensor:
        """Flat elements [start, stop). Raises DeltaflError if the file is shorter than its header said."""
        entry = self.layout.entries[name]
        values = torch.empty(stop - start, dtype=DTYPES[entry.dtype])
        self._read(name, entry, start, memoryview(values.view(torch.uint8).numpy()))  # type: ignore[arg-type]
        return values

    def read_into(self, name: str, start: int, stop: int, out: Tensor) -> None:
        """Write flat elements [start, stop) into `out`, in its dtype; each thread reads into one buffer of its own."""
        entry = self.layout.entries[name]
        wanted = (entry.dtype, stop - start)
        if (
            getattr(self._local, "held", None) != wanted
        ):  # blocks are of one size, and cutting a view takes as long as
            self._cut(*wanted)  # an operation
        self._read(name, entry, start, self._local.view)
        out.copy_(self._local.values)

    def _cut(self, dtype: str, count: int) -> None:
        """Make this thread's buffer one of `count` elements of `dtype`."""
        size = SIZES[dtype] * count
        buffer = getattr(self._local, "buffer", None)
        if buffer is None or len(buffer) < size:
            buffer = self._local.buffer = torch.empty(size, dtype=torch.uint8)
        self._local.view = memoryview(buffer[:size].numpy())  # type: ignore[arg-type]
        self._local.values = buffer[:size].view(DTYPES[dtype])
        self._local.held = (dtype, count)

    def _read(self, name: str, entry: Entry, start: int, into: memoryview) -> None:
        """Fill `into` from element `start` on. Raises DeltaflError if the file is shorter than its header said."""
        at, handle = entry.start + start * SIZES[entry.dtype], self._files[entry.file]
        while into.nbytes:
            count = os.preadv(handle, [into], at)
            if not count:
                raise DeltaflError(
                    f'"{entry.file}": ended while tensor "{name}" was read; was it changed meanwhile?'
                )
            into, at = into[count:], at + count

    def close(self) -> None:
        """Close the files."""
        while self._files:
            os.close(self._files.popitem()[1])

    def __enter__(self) -> "Checkpoint":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()


def open_tensors(ref: str | os.PathLike[str] | Layout) -> Tensors:
    """The tensors of a path, hub id or layout: a `Checkpoint`, or a dict for a torch state dict.

    Raises DeltaflError, also for a pickle that would run code.
    """
    layout = ref if isinstance(ref, Layout) else layouts.read_layout(ref)
    if not layout.pickled:
        return Checkpoint(layout)
    tensors: dict[str, Tensor] = {}
    for file in layout.files:
        held = _state_dict(file)
        if twice := sorted(tensors.keys() & held.keys()):
            raise DeltaflError(
                f'"{file}": holds {shorten(twice)}, as another file of the checkpoint does; remove one'
            )
        tensors |= held
    return tensors


def _state_dict(file: Path) -> dict[str, Tensor]:
    try:
        held: Any = torch.load(file, map_location="cpu", weights_only=True, mmap=_is_zip(file))
    except Exception as error:  # the unpickler raises whatever damaged bytes lead to
        if isinstance(error, pickle.UnpicklingError) and (found := _CODE.search(str(error))):
            raise DeltaflError(
                f'"{file}": holds more than tensors, and reading it would run code ({found[1]}); '
                "save the state dict alone, best as .safetensors"
            ) from None
        raise DeltaflError(
            f'"{file}": truncated, corrupt or not a torch state dict; download it again'
        ) from None
    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(held, Mapping) and isinstance(held.get(key), Mapping):
            held = held[key]
    if not isinstance(held, Mapping) or not all(isinstance(v, Tensor) for v in held.values()):
        raise DeltaflError(f'"{file}": is not a state dict (a mapping from names to tensors)')
    for name, tensor in held.items():
        if tensor.dtype not in NAMES:
            raise DeltaflError(
                f'"{file}": tensor "{name}" has dtype {tensor.dtype}, which is not supported'
            )
    return {str(name): tensor.detach() for name, tensor in held.items()}


_CODE = re.compile(r"(?:GLOBAL|unrecognized function) (\S+)")


def _is_zip(file: Path) -> bool:
    with file.open("rb") as stream:
        return stream.read(4) == b"PK\x03\x04"


def entries_of(tensors: Tensors) -> Mapping[str, Entry]:
    """Name, dtype and shape of every tensor, as the naming layer compares them."""
    if isinstance(tensors, Checkpoint):
        return tensors.layout.entries
    return {
        n: Entry(NAMES.get(t.dtype, str(t.dtype)), tuple(t.shape), Path(), 0, 0)
        for n, t in tensors.items()
    }


def refuse_untied(alignment: Alignment, base: Tensors, tuned: Mapping[str, Tensors]) -> None:
    """Raise DeltaflError for tensors that the naming layer took for twins and that hold different values."""
    problems = []
    for label, pairs in alignment.tied.items():
        for name, twin in pairs:
            if _equal(tuned[label] if label else base, name, twin):
                continue
            here = (
                f'model "{label}": "{name}" differs from "{twin}", but in the base the two are one'
            )
            there = f'the base: "{name}" differs from "{twin}", but in a model the two are one'
            remedy = (
                f'merge into a base that is not tied, or copy "{twin}" from the base with --exclude'
            )
            problems.append(
                f"{here}; {remedy}"
                if label
                else f'{there}; copy "{name}" from the base with --exclude'
            )
    if problems:
        raise DeltaflError(*problems)


def _equal(tensors: Tensors, a: str, b: str) -> bool:
    """Whether two tensors hold the same values; read by blocks."""
    shape = shape_of(tensors, a)
    return shape == shape_of(tensors, b) and all(
        torch.equal(block_of(tensors, a, *span), block_of(tensors, b, *span))
        for span in blocks(numel_of(tensors, a))
    )


class Latest(Mapping[str, Tensor]):
    """Another mapping, with the block read last kept in `dtype` for each thread.

    n differences from one base and the step itself ask for the same block of the base one after the other: it is
    read and converted once.
    """

    def __init__(
        self,
        tensors: Tensors,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self._tensors, self._dtype, self._local = tensors, dtype, threading.local()
        self.device = torch.device(device)

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one tensor."""
        return shape_of(self._tensors, name)

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of the blocks."""
        return self._dtype

    def block(self, name: str, start: int, stop: int) -> Tensor:
        """Flat elements [start, stop) in `dtype`; not to be overwritten."""
        key = (name, start, stop)
        local = self._local
        if getattr(local, "key", None) != key:
            if getattr(local, "count", None) != stop - start:
                local.block = torch.empty(stop - start, dtype=self._dtype, device=self.device)
                local.count = stop - start
            local.key = None  # while it is being filled
            read_into(self._tensors, name, start, stop, local.block)
            local.key = key
        return local.block


class Difference(Mapping[str, Tensor]):
    """delta = tuned - base as a lazy mapping in the base's names, in float32 or, to be exact, float64.

    names: base name -> tuned name, the tensors that the delta has.
    """

    fresh_blocks = True

    def __init__(
        self, base: Tensors, tuned: Tensors, names: Mapping[str, str], dtype: torch.dtype
    ) -> None:
        self._base, self.tuned, self._names, self._dtype = base, tuned, names, dtype
        self.device = device_of(base, next(iter(names))) if names else torch.device("cpu")

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __getitem__(self, name: str) -> Tensor:
        tuned = self.tuned[self._names[name]].to(self._dtype)
        return tuned - self._base[name].to(self._dtype)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one tensor."""
        return shape_of(self._base, name)

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of the difference."""
        return self._dtype

    def block(self, name: str, start: int, stop: int) -> Tensor:
        """Flat elements [start, stop) of tuned - base."""
        base = block_of(self._base, name, start, stop).to(self._dtype)
        tuned = block_of(self.tuned, self._names[name], start, stop)
        fresh = getattr(self.tuned, "fresh_blocks", False)
        return tuned.to(base.device, self._dtype, copy=not fresh).sub_(base)

    def read_into(self, name: str, start: int, stop: int, out: Tensor) -> None:
        """Write flat elements [start, stop) of tuned - base into `out`."""
        if out.dtype != self._dtype:
            out.copy_(self.block(name, start, stop))
            return
        read_into(self.tuned, self._names[name], start, stop, out)
        base = block_of(self._base, name, start, stop)
        out.sub_(base if base.dtype == out.dtype and base.device == out.device else base.to(out))
