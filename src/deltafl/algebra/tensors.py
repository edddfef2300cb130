"""Named tensors that are read a piece at a time: deltas, aggregates, models and files.

`Tensors` is any mapping name -> tensor. `Lazy` is one that reads a part of a tensor without making
the whole; `lazy` wraps a plain dict as one. Blocks of a fixed length, in a fixed order, are part of
every definition here, so that streaming, in-memory and federated results are the same bits.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from deltafl.errors import DeltaflError

Tensors: TypeAlias = Mapping[str, Tensor]

BLOCK = 1 << 18
"""Elements in one block: few enough for the caches, enough that the calls cost little beside it."""


class Spec(NamedTuple):
    """What is known of a tensor before it is read. device: where its blocks are made."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device = torch.device("cpu")

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


class Lazy(Mapping[str, Tensor], ABC):
    """A mapping name -> tensor of which a part can be read alone.

    A kind of its own sets `names`, in order and quick to look into, and defines `spec`, a KeyError
    for other names, and `read`.
    whole: reading a part costs as much as the tensor, so one worker should read all of its parts.
    """

    names: Collection[str]
    whole: bool = False

    @abstractmethod
    def spec(self, name: str) -> Spec:
        """Shape, dtype and device of one tensor; nothing is read."""

    @abstractmethod
    def read(self, name: str, start: int, stop: int, out: Tensor) -> None:
        """Write the flat elements [start, stop) of one tensor into `out`, (stop - start,).

        They are those of the tensor in its own dtype, converted to that of `out`, which may be on
        another device.
        """

    def block(self, name: str, start: int, stop: int, dtype: torch.dtype | None = None) -> Tensor:
        """Flat elements [start, stop), (stop - start,), in `dtype`, by default the tensor's own.

        Not to be written to: it may be a part of what others hold, and is good until the next call.
        """
        spec = self.spec(name)
        out = torch.empty(stop - start, dtype=dtype or spec.dtype, device=spec.device)
        self.read(name, start, stop, out)
        return out

    def __getitem__(self, name: str) -> Tensor:
        spec = self.spec(name)
        out = torch.empty(spec.shape, dtype=spec.dtype, device=spec.device)
        flat = out.view(-1)
        for start, stop in blocks(spec.numel):
            self.read(name, start, stop, flat[start:stop])
        return out

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def __contains__(self, name: object) -> bool:
        return name in self.names


def lazy(tensors: Tensors) -> Lazy:
    """The same tensors as a `Lazy`; one that is lazy comes back as it is."""
    return tensors if isinstance(tensors, Lazy) else _InMemory(tensors)


class _InMemory(Lazy):
    """Whole tensors; blocks are views, without gradient."""

    def __init__(self, tensors: Tensors) -> None:
        self._tensors = tensors
        self.names = tensors

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def spec(self, name: str) -> Spec:
        tensor = self._tensors[name]
        return Spec(tuple(tensor.shape), tensor.dtype, tensor.device)

    def read(self, name: str, start: int, stop: int, out: Tensor) -> None:
        out.copy_(self.block(name, start, stop))

    def block(self, name: str, start: int, stop: int, dtype: torch.dtype | None = None) -> Tensor:
        part = self._tensors[name].detach().reshape(-1)[start:stop]
        return part if dtype is None else part.to(dtype)


class Joined(Lazy):
    """Tensors of several mappings as one: name here -> (mapping, name there)."""

    def __init__(self, places: Mapping[str, tuple[Tensors, str]]) -> None:
        self._places = {name: (lazy(part), there) for name, (part, there) in places.items()}
        self.names = self._places

    def spec(self, name: str) -> Spec:
        part, there = self._places[name]
        return part.spec(there)

    def read(self, name: str, start: int, stop: int, out: Tensor) -> None:
        part, there = self._places[name]
        part.read(there, start, stop, out)


def blocks(numel: int) -> Iterator[tuple[int, int]]:
    """The (start, stop) pairs of one tensor's blocks, in order."""
    for start in range(0, numel, BLOCK):
        yield start, min(start + BLOCK, numel)


def memory_like(out: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """`out` where it has this dtype and is on this device, else new memory of its shape.

    `out.copy_` of the result costs nothing where it is `out`.
    """
    if out.dtype == dtype and out.device == device:
        return out
    return torch.empty(out.shape, dtype=dtype, device=device)


def round_once(values: Tensor, dtype: torch.dtype) -> Tensor:
    """`values` in `dtype` with one correct rounding (nearest, ties to even), also of float64.

    torch converts float64 to bfloat16 and float16 through float32, and two roundings differ from
    one in about 1 of 10^5 elements. The float32 step here rounds to odd (the last bit keeps the
    memory of what was cut off), after which the second rounding is right (Boldo and Melquiond
    2008).
    """
    if values.dtype != torch.float64 or dtype.itemsize >= 4:
        return values.to(dtype)
    nearest = values.to(torch.float32)
    back = nearest.double()
    bits = nearest.view(torch.int32)
    odd = (bits - (back.abs() > values.abs()).int()) | 1
    return torch.where(back != values, odd, bits).view(torch.float32).to(dtype)


def device_named(name: str | None) -> torch.device:
    """The device that a user names: cpu, cuda or cuda:1; None: the GPU where there is one.

    Raises:
        DeltaflError: it is not here.
    """
    found = torch.cuda.device_count()
    try:
        device = torch.device(name or ("cuda" if found else "cpu"))
    except RuntimeError:
        raise DeltaflError(
            f'--device "{name}" is not a device; write cpu, cuda or cuda:1'
        ) from None
    if device.type == "cuda" and (device.index or 0) >= found:
        raise DeltaflError(f"--device {name}: torch finds {found} GPUs here; use --device cpu")
    return device
