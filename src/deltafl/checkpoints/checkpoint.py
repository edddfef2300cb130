"""Checkpoints as lazy mappings of named tensors, read by blocks, never whole."""

import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deltafl.algebra.low_rank import LowRank
from deltafl.algebra.tensors import Lazy, Spec, Tensors, blocks, lazy, memory_like
from deltafl.checkpoints.adapter import Adapter
from deltafl.checkpoints.align import Alignment
from deltafl.checkpoints.layout import CODES, DTYPES, Entry, Layout, read_layout
from deltafl.errors import DeltaflError, shorten


def torch_dtype(code: str) -> torch.dtype:
    """The dtype of safetensors' spelling."""
    return vars(torch)[DTYPES[code]]


def dtype_code(dtype: torch.dtype) -> str:
    """A dtype in safetensors' spelling; torch's name of one that it does not know."""
    return CODES.get(str(dtype).removeprefix("torch."), str(dtype))


def bytes_of(block: Tensor) -> memoryview:
    """The memory of a flat CPU tensor, to read into or to write from."""
    return block.view(torch.uint8).numpy().data


class Checkpoint(Lazy):
    """A checkpoint on disk, in the files' dtypes.

    Reads with pread rather than mmap: memory is what is asked for, and a file that shrinks while it
    is read is an error instead of a dead process.
    """

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.names = layout.entries
        self._specs = {n: Spec(e.shape, torch_dtype(e.dtype)) for n, e in layout.entries.items()}
        self._files = {file: os.open(file, os.O_RDONLY) for file in layout.files}

    def spec(self, name: str) -> Spec:
        return self._specs[name]

    def read(self, name: str, start: int, stop: int, out: Tensor) -> None:
        """Raises DeltaflError if the file is shorter than its header said."""
        entry, dtype = self.layout.entries[name], self._specs[name].dtype
        values = memory_like(out, dtype, torch.device("cpu"))
        into, at = bytes_of(values), entry.start + start * dtype.itemsize
        while into.nbytes:
            count = os.preadv(self._files[entry.file], [into], at)
            if not count:
                raise DeltaflError(
                    f'"{entry.file}": ended while tensor "{name}" was read; '
                    "was it changed meanwhile?"
                )
            into, at = into[count:], at + count
        out.copy_(values)

    def close(self) -> None:
        """Close the files."""
        while self._files:
            os.close(self._files.popitem()[1])

    __del__ = close


def open_tensors(ref: str | os.PathLike[str] | Layout) -> Tensors:
    """The tensors of a path, hub id or layout: a `Checkpoint`, or a dict for a torch state dict.

    Raises DeltaflError, also for a pickle that would run code.
    """
    layout = ref if isinstance(ref, Layout) else read_layout(ref)
    if not layout.pickled:
        return Checkpoint(layout)
    tensors: dict[str, Tensor] = {}
    for file in layout.files:
        held = _state_dict(file)
        if twice := sorted(tensors.keys() & held):
            raise DeltaflError(
                f'"{file}": holds {shorten(twice)}, as another file of the checkpoint does; '
                "remove one"
            )
        tensors |= held
    return tensors


def low_rank(
    adapter: Adapter, held: Tensors, names: Mapping[str, str], specs: Mapping[str, Spec]
) -> LowRank:
    """The delta of an adapter: of the tensors in `specs`, zeros where it changes none.

    held: the tensors of its file. names: of the base -> of the adapter's weights.
    """

    def product(name: str) -> tuple[Tensor, Tensor] | None:
        found, spec = adapter.products.get(names.get(name, "")), specs[name]
        if found is None:
            return None
        a, b = (held[side].flatten(1).to(spec.device, spec.dtype) for side in (found.a, found.b))
        return (found.scale * a.mT, b.mT) if found.transposed else (found.scale * b, a)

    return LowRank(specs, product)


def _state_dict(file: Path) -> dict[str, Tensor]:
    try:
        held: Any = torch.load(file, "cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except Exception:  # the unpickler raises whatever damaged bytes lead to
        raise DeltaflError(
            f'"{file}": truncated, corrupt, or holds more than tensors, so that reading it could '
            "run code; download it again, or save the state dict alone, best as .safetensors"
        ) from None
    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(held, Mapping) and isinstance(held.get(key), Mapping):
            held = held[key]
    if not isinstance(held, Mapping) or not all(isinstance(v, Tensor) for v in held.values()):
        raise DeltaflError(f'"{file}": is not a state dict (a mapping from names to tensors)')
    for name, tensor in held.items():
        if dtype_code(tensor.dtype) not in DTYPES:
            raise DeltaflError(
                f'"{file}": tensor "{name}" has dtype {tensor.dtype}, which is not supported'
            )
    return {str(name): tensor.detach() for name, tensor in held.items()}


def entries_of(tensors: Tensors) -> Mapping[str, Entry]:
    """Name, dtype and shape of every tensor, as the naming layer compares them."""
    held = lazy(tensors)
    specs = {name: held.spec(name) for name in held}
    return {n: Entry(dtype_code(spec.dtype), spec.shape) for n, spec in specs.items()}


def refuse_untied(alignment: Alignment, base: Tensors, tuned: Mapping[str, Tensors]) -> None:
    """Raise DeltaflError for tensors that were taken for twins and hold different values."""
    problems = []
    for label, twins in alignment.tied.items():
        for name, twin in twins.items():
            if _equal(tuned[label] if label else base, name, twin):
                continue
            where, other = (f'model "{label}"', "the base") if label else ("the base", "a model")
            remedy = "merge into a base that is not tied, or " * bool(label)
            problems.append(
                f'{where}: "{name}" differs from "{twin}", but in {other} the two are one; '
                f'{remedy}copy "{twin if label else name}" from the base with --exclude'
            )
    if problems:
        raise DeltaflError(*problems)


def _equal(tensors: Tensors, a: str, b: str) -> bool:
    """Whether two tensors hold the same values; read by blocks."""
    held = lazy(tensors)
    spec, other = held.spec(a), held.spec(b)
    return spec.shape == other.shape and all(
        torch.equal(held.block(a, *span), held.block(b, *span)) for span in blocks(spec.numel)
    )
