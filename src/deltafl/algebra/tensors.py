"""Flat algebra on named tensors: the one data type that deltas, updates and models share.

`Tensors` is any mapping name -> tensor: a dict, or a lazy checkpoint that also answers `block(name, start, stop)`
without reading the whole tensor. Blocks of a fixed length, in a fixed order, are part of every definition here, so
that streaming, in-memory and federated results are the same bits.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Protocol, TypeAlias, TypeGuard

import torch
from torch import Tensor

from deltafl.errors import DeltaflError

Tensors: TypeAlias = Mapping[str, Tensor]

BLOCK = 1 << 18
"""Elements in one block: few enough for the caches, enough that the calls for one cost little beside its arithmetic."""


class Blocked(Protocol):
    """A lazy mapping that reads a part of a tensor. `block` returns the flat elements [start, stop) of `name`."""

    def block(self, name: str, start: int, stop: int) -> Tensor: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def dtype(self, name: str) -> torch.dtype: ...


def is_blocked(tensors: Tensors) -> TypeGuard[Blocked]:
    """Whether the mapping is lazy. `isinstance` with a protocol would take longer than to read a block."""
    return hasattr(tensors, "block")


class Joined(Mapping[str, Tensor]):
    """Several mappings, lazy or not, as one; their names differ."""

    def __init__(self, *parts: Tensors) -> None:
        self._part = {name: part for part in parts for name in part}

    def __iter__(self) -> Iterator[str]:
        return iter(self._part)

    def __len__(self) -> int:
        return len(self._part)

    def __contains__(self, name: object) -> bool:
        return name in self._part

    def __getitem__(self, name: str) -> Tensor:
        return self._part[name][name]

    @property
    def device(self) -> torch.device:
        """Where the blocks are."""
        name = next(iter(self._part))
        return device_of(self._part[name], name)

    def block(self, name: str, start: int, stop: int) -> Tensor:
        """Flat elements [start, stop) of one tensor."""
        return block_of(self._part[name], name, start, stop)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one tensor."""
        return shape_of(self._part[name], name)

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of one tensor."""
        return dtype_of(self._part[name], name)


def block_of(tensors: Tensors, name: str, start: int, stop: int) -> Tensor:
    """Flat elements [start, stop) of one tensor, (stop - start,), in its own dtype."""
    if is_blocked(tensors):
        return tensors.block(name, start, stop)
    return tensors[name].detach().reshape(-1)[start:stop]


def read_into(tensors: Tensors, name: str, start: int, stop: int, out: Tensor) -> None:
    """Write flat elements [start, stop) of one tensor, in the dtype of `out`, into `out`, (stop - start,)."""
    if hasattr(tensors, "read_into"):
        tensors.read_into(name, start, stop, out)  # type: ignore[attr-defined]
    else:
        out.copy_(block_of(tensors, name, start, stop))


def shape_of(tensors: Tensors, name: str) -> tuple[int, ...]:
    """Shape of one tensor, without reading it where the mapping is lazy."""
    return tensors.shape(name) if is_blocked(tensors) else tuple(tensors[name].shape)


def device_of(tensors: Tensors, name: str) -> torch.device:
    """Device of one tensor's blocks, without reading it where the mapping is lazy; a lazy one says if it is no CPU."""
    return (
        getattr(tensors, "device", torch.device("cpu"))
        if is_blocked(tensors)
        else tensors[name].device
    )


def numel_of(tensors: Tensors, name: str) -> int:
    """Number of elements of one tensor."""
    return math.prod(shape_of(tensors, name))


def dtype_of(tensors: Tensors, name: str) -> torch.dtype:
    """Dtype of one tensor, without reading it where the mapping is lazy."""
    return tensors.dtype(name) if is_blocked(tensors) else tensors[name].dtype


def blocks(numel: int, size: int = BLOCK) -> Iterator[tuple[int, int]]:
    """The (start, stop) pairs of one tensor's blocks, in order."""
    for start in range(0, numel, size):
        yield start, min(start + size, numel)


def round_once(values: Tensor, dtype: torch.dtype) -> Tensor:
    """`values` in `dtype` with one correct rounding (nearest, ties to even), also from float64 to 16 bits.

    torch converts float64 to bfloat16 and float16 through float32, and two roundings differ from one in about 1 of
    10^5 elements. The float32 step here rounds to odd (the last bit keeps the memory of what was cut off), after
    which the second rounding is the right one (Boldo and Melquiond 2008).
    """
    if values.dtype != torch.float64 or dtype.itemsize >= 4:
        return values.to(dtype)
    nearest = values.to(torch.float32)
    back = nearest.double()
    bits = nearest.view(torch.int32)
    odd = (bits - (back.abs() > values.abs()).int()) | 1
    return torch.where(back != values, odd, bits).view(torch.float32).to(dtype)


def device_named(name: str) -> torch.device:
    """The device that a user names: cpu, cuda or cuda:1. Raises DeltaflError if it is unknown or not here."""
    try:
        device = torch.device(name)
    except RuntimeError:
        raise DeltaflError(
            f'--device "{name}" is not a device; write cpu, cuda or cuda:1'
        ) from None
    found = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= found:
        here = f"{found} of them" if found else "no GPU"
        raise DeltaflError(f"--device {name}: torch finds {here} here; use --device cpu")
    return device
