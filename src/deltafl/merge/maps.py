"""Linear maps of a net that runs: where they are, what they are given, passes that wait at them."""

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from deltafl.algebra.tensors import Tensors

PIECE = 1 << 24
"""Elements of the rows that are multiplied at once."""

LINEAR, CONV = nn.functional.linear, torch.conv2d
ARGUMENTS = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
"""Of torch.conv2d; a linear map has the first three."""


@dataclass(frozen=True)
class Map:
    """A place where a weight is applied: rows x, with a 1 after them if there is a bias, to W x.

    weight, bias: their names. window: dilation, padding and stride of a convolution, whose rows
    are its patches. groups: of a convolution, each with rows and a matrix of its own.
    """

    weight: str
    bias: str | None
    window: tuple[Any, Any, Any] | None = None
    groups: int = 1

    def rows(self, given: Tensor, shape: Sequence[int]) -> Tensor:
        """What the map, with a weight of this shape, is given: (groups, rows, in)."""
        if self.window is None:
            rows = given.reshape(1, -1, given.shape[-1])
        else:
            patches = nn.functional.unfold(given, (shape[2], shape[3]), *self.window)
            rows = patches.unflatten(1, (self.groups, -1)).permute(1, 0, 3, 2).flatten(1, 2)
        return nn.functional.pad(rows, (0, 1), value=1.0) if self.bias else rows

    def matrix(self, tensors: Tensors) -> Tensor:
        """Weight and bias as (groups, out, in), float64."""
        weight = tensors[self.weight].double()
        parts = [weight.reshape(self.groups, len(weight) // self.groups, -1)]
        if self.bias:
            parts.append(tensors[self.bias].double().view(self.groups, -1, 1))
        return torch.cat(parts, 2)

    def tensors(self, matrix: Tensor, like: Tensors) -> dict[str, Tensor]:
        """The weight and the bias of a matrix, in the shapes of others."""
        parts = {self.weight: matrix[..., :-1] if self.bias else matrix}
        if self.bias:
            parts[self.bias] = matrix[..., -1]
        return {n: part.reshape(like[n].shape).contiguous() for n, part in parts.items()}


Read: TypeAlias = Callable[[str], Tensor]
"""Name in the base -> the tensor of some model."""


See: TypeAlias = Callable[[object, Mapping[str, Any], Sequence[str]], None]
"""Told before a function uses tensors: which, its arguments if it is a map, the tensors' names."""


class Reading(TorchFunctionMode):
    """Within it, who uses a parameter or buffer of a module is given another model's.

    places: id of the parameter -> its name, which `read` is asked for after `see` was told.
    """

    def __init__(self, places: Mapping[int, str], read: Read, see: See) -> None:
        super().__init__()
        self.places, self.read, self.see = places, read, see

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.__name__ == "__get__":  # a shape or a dtype
            return func(*args, **kwargs)
        names = [self.places.get(id(value)) for value in (*args, *kwargs.values())]
        if used := [name for name in names if name]:
            self.see(func, dict(zip(ARGUMENTS, args, strict=False)) | kwargs, used)
        return func(*map(self._given, args), **{k: self._given(v) for k, v in kwargs.items()})

    def _given(self, value: Any) -> Any:
        name = self.places.get(id(value))
        return value if name is None else self.read(name)


class _Left(BaseException):
    """Ends a pass that nobody waits for."""


class Pass:
    """A forward pass in a thread, which stops before each of the weights `stops` is applied."""

    def __init__(
        self, work: Callable[[], object], places: Mapping[int, str], read: Read, stops: set[str]
    ) -> None:
        self._work, self._stops = work, stops
        self._reading = Reading(places, read, self._see)
        self._input = torch.empty(0)
        self._error: BaseException | None = None
        self._left = False
        self._go, self._stopped = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            with torch.no_grad(), self._reading:
                self._wait()
                self._work()
        except BaseException as error:
            self._error = error
        self._stopped.release()

    def _wait(self) -> None:
        self._go.acquire()
        if self._left:
            raise _Left

    def _see(self, func: object, given: Mapping[str, Any], names: Sequence[str]) -> None:
        if func in (LINEAR, CONV) and self._stops.intersection(names):
            self._input = given["input"]
            self._stopped.release()
            self._wait()

    def advance(self) -> Tensor:
        """Go on to the next stop; what is given there. Raises what the pass raises."""
        self._go.release()
        self._stopped.acquire()
        if self._error is not None:
            raise self._error
        return self._input

    def leave(self) -> None:
        """End it where it is."""
        self._left = True
        self._go.release()
        self._thread.join()


def sums(m: Map, left: Tensor, right: Tensor, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Means over rows of x_left x_right^T and x_right x_right^T, (groups, in, in) float64."""
    cross, gram, count = torch.zeros(()), torch.zeros(()), 0
    area = shape[2] * shape[3] if m.window else 1
    size = max(1, PIECE // (area * left[0].numel()))
    for ours, theirs in zip(left.split(size), right.split(size), strict=True):
        rows = m.rows(theirs, shape)
        gram = gram + (rows.mT @ rows).double()
        cross = cross + (m.rows(ours, shape).mT @ rows).double()
        count += rows.shape[1]
    return cross / count, gram / count
