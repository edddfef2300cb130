"""Results of forked processes: tensors through shared memory, the rest pickled."""

import io
import math
import mmap
import pickle
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deltafl.algebra.processes import portable

ALIGNMENT = 64

Place = tuple[int, torch.dtype, tuple[int, ...]]


def room_for(tensors: Iterable[Tensor]) -> int:
    """Bytes that they take in a `SharedMemory`."""
    return sum(-(-t.numel() * t.element_size() // ALIGNMENT) * ALIGNMENT for t in tensors)


class SharedMemory:
    """Memory that processes forked later share, with tensors end to end. Pages that nobody writes take no room."""

    def __init__(self, num_bytes: int) -> None:
        self._bytes = torch.frombuffer(mmap.mmap(-1, max(1, num_bytes)), dtype=torch.uint8)
        self._used = 0

    def clear(self) -> None:
        self._used = 0

    def hold(self, tensor: Tensor) -> Tensor:
        """A copy of a tensor for which there is room."""
        place = self.put(tensor)
        assert place is not None
        return self.at(*place)

    def put(self, tensor: Tensor) -> Place | None:
        """Where the copy of a tensor is; None if it does not fit."""
        place = (self._used, tensor.dtype, tuple(tensor.shape))
        stop = self._used + tensor.numel() * tensor.element_size()
        if stop > len(self._bytes):
            return None
        self._used = -(-stop // ALIGNMENT) * ALIGNMENT
        self.at(*place).copy_(tensor)
        return place

    def at(self, start: int, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        """The tensor at a place."""
        stop = start + math.prod(shape) * dtype.itemsize
        return self._bytes[start:stop].view(dtype).view(shape)


class _Pickler(pickle.Pickler):
    """Names what was known before the fork, puts tensors into shared memory while there is room, pickles the rest."""

    def __init__(self, file: io.BytesIO, known: Mapping[int, str], memory: SharedMemory) -> None:
        super().__init__(file, pickle.HIGHEST_PROTOCOL)
        self._known_objects, self._memory = known, memory

    def persistent_id(self, obj: Any) -> Any:
        if isinstance(obj, Tensor) and obj.device.type == "cpu":
            return self._memory.put(obj.detach())
        return self._known_objects.get(id(obj))


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, known: Mapping[str, object], memory: SharedMemory) -> None:
        super().__init__(file)
        self._known_objects, self._memory = known, memory

    def persistent_load(self, pid: Any) -> Any:
        return self._known_objects[pid] if isinstance(pid, str) else self._memory.at(*pid)


@dataclass(frozen=True)
class _Failure:
    error: BaseException


def pack(result: object, known: Mapping[int, str], memory: SharedMemory) -> bytes:
    """A result, its tensors in `memory`, objects of `known` (id -> name) by name. What was in `memory` is gone."""
    memory.clear()
    file = io.BytesIO()
    _Pickler(file, known, memory).dump(result)
    return file.getvalue()


def pack_error(error: BaseException) -> bytes:
    """An error for the other side to raise."""
    return pickle.dumps(_Failure(portable(error)))


def unpack(answer: bytes, known: Mapping[str, object], memory: SharedMemory) -> Any:
    """What was packed, its tensors still in `memory`. Raises the error, if that was packed."""
    result = _Unpickler(io.BytesIO(answer), known, memory).load()
    if isinstance(result, _Failure):
        raise result.error
    return result
