"""Linear maps of a net that runs: where they are, what they are given, passes that wait at them."""

import threading
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from deltafl.algebra.tensors import Tensors

PIECE = 1 << 24
"""Elements of the rows that are multiplied at once."""

LINEAR, CONV = nn.functional.linear, torch.conv2d
ADDS = {"add", "iadd", "radd"}
"""Names of additions, without underscores around them."""

ARGUMENTS = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
"""Of torch.conv2d; a linear map has the first three."""


class Place(NamedTuple):
    """Where a pass is: how many linear maps it has applied, and calls of other functions since; so
    counted, a mask for padding moves nothing behind the first map.
    """

    maps: int = 0
    calls: int = 0

    def after(self, func: object) -> "Place":
        """With one more call."""
        return Place(self.maps + 1) if func in (LINEAR, CONV) else Place(self.maps, self.calls + 1)


@dataclass(frozen=True)
class Map:
    """A place where a weight is applied: rows x, with a 1 after them if there is a bias, to W x.

    weight, bias: their names. window: dilation, padding and stride of a convolution, whose rows
    are its patches. groups: of a convolution, each with rows and a matrix of its own. skip: the
    call of a pass to whose result that of the map is added.
    """

    weight: str
    bias: str | None
    window: tuple[Any, Any, Any] | None = None
    groups: int = 1
    skip: Place | None = None

    def rows(self, given: Tensor, shape: Sequence[int]) -> Tensor:
        """What the map, with a weight of this shape, is given: (groups, rows, in)."""
        if self.window is None:
            rows = given.reshape(1, -1, given.shape[-1])
        else:
            patches = nn.functional.unfold(given, (shape[2], shape[3]), *self.window)
            rows = patches.unflatten(1, (self.groups, -1)).permute(1, 0, 3, 2).flatten(1, 2)
        return nn.functional.pad(rows, (0, 1), value=1.0) if self.bias else rows

    def results(self, made: Tensor) -> Tensor:
        """What the map gives, or is added to, as rows: (groups, rows, out)."""
        if self.window is None:
            return made.reshape(1, -1, made.shape[-1])
        return made.unflatten(1, (self.groups, -1)).permute(1, 0, 3, 4, 2).flatten(1, 3)

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

Saw: TypeAlias = Callable[[Callable[..., object], Sequence[object], object], None]
"""Told after every function: which, its arguments, () if any is by keyword, its result."""


class Reading(TorchFunctionMode):
    """Within it, who uses a parameter or buffer of a module is given another model's.

    places: id of the parameter -> its name, which `read` is asked for after `see` was told.
    """

    def __init__(self, places: Mapping[int, str], read: Read, see: See, saw: Saw) -> None:
        super().__init__()
        self.places, self.read, self.see, self.saw = places, read, see, saw

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.__name__ == "__get__":  # a shape or a dtype
            return func(*args, **kwargs)
        names = [self.places.get(id(value)) for value in (*args, *kwargs.values())]
        if used := [name for name in names if name]:
            self.see(func, dict(zip(ARGUMENTS, args, strict=False)) | kwargs, used)
        made = func(*map(self._given, args), **{k: self._given(v) for k, v in kwargs.items()})
        self.saw(func, () if kwargs else args, made)
        return made

    def _given(self, value: Any) -> Any:
        name = self.places.get(id(value))
        return value if name is None else self.read(name)


def find_maps(
    work: Callable[[], object], places: Mapping[int, str], read: Read, changed: Collection[str]
) -> list[Map]:
    """The maps of a forward pass, in the order in which they are applied (see `Reading`).

    A weight that is used twice (tied, or of a module that runs twice) is none, nor is one that
    never runs, or that is not among those that some model has changed.
    """
    maps, uses, skips = dict[str, Map](), Counter[str](), dict[str, Place]()
    results, calls = dict[int, tuple[str, Place]](), dict[int, Place]()
    seen, here = list[object](), Place()

    def see(func: object, given: Mapping[str, Any], names: Sequence[str]) -> None:
        uses.update(names)
        weight, bias = (places.get(id(given.get(key))) for key in ("weight", "bias"))
        padding, whole = given.get("padding", 0), 1 + (given.get("bias") is not None)
        if func in (LINEAR, CONV) and weight and len(names) == whole and padding != "same":
            window = (given.get("dilation", 1), padding, given.get("stride", 1))
            window = window if func is CONV else None
            maps[weight] = Map(weight, bias, window, given.get("groups", 1))

    def saw(func: Callable[..., object], given: Sequence[object], made: object) -> None:
        nonlocal here
        here = here.after(func)
        seen.append(made)  # as long as it lives nothing else has its id
        if not isinstance(made, Tensor):
            return
        weight = places.get(id(given[1])) if func in (LINEAR, CONV) and given else None
        if weight:
            results[id(made)] = weight, here
        elif func.__name__.strip("_") in ADDS:
            for ours, other in zip(given, reversed(given), strict=True):
                weight, call = results.get(id(ours), ("", here))
                whole = isinstance(other, Tensor) and other.shape == made.shape
                if weight and whole and calls.get(id(other), call) < call:
                    skips[weight] = calls[id(other)]
        calls.setdefault(id(made), here)

    with torch.no_grad(), Reading(places, read, see, saw):
        work()
    return [
        replace(m, skip=skips.get(m.weight))
        for m in maps.values()
        if uses[m.weight] == uses[m.bias or m.weight] == 1 and m.weight in changed
    ]


class _Left(BaseException):
    """Ends a pass that nobody waits for."""


class Pass:
    """A forward pass in a thread, which stops before each of the maps is applied.

    skips: call -> its result, as long as a map that it has come to, or will, is added
    to that.
    """

    def __init__(
        self,
        work: Callable[[], object],
        places: Mapping[int, str],
        read: Read,
        maps: Sequence[Map],
    ) -> None:
        self._work, self._ahead = work, maps
        self._stops, self._kept = {m.weight for m in maps}, {m.skip for m in maps}
        self._reading = Reading(places, read, self._see, self._saw)
        self._input, self._place = torch.empty(0), Place()
        self.skips: dict[Place, Any] = {}
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

    def _saw(self, func: object, given: object, made: object) -> None:
        self._place = self._place.after(func)
        if self._place in self._kept:
            self.skips[self._place] = made

    def advance(self) -> Tensor:
        """Go on to the next map; what is given there. Raises what the pass raises."""
        wanted, self._ahead = {m.skip for m in self._ahead}, self._ahead[1:]
        self.skips = {call: made for call, made in self.skips.items() if call in wanted}
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


def sums(
    m: Map, matrix: Tensor, left: Tensor, right: Tensor, shape: Sequence[int], error: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Means over rows of (W x_left + e) x_right^T, (groups, out, in), and of x_right x_right^T,
    (groups, in, in), float64. matrix: W. error: e, as the map's result; None: 0.
    """
    area = shape[2] * shape[3] if m.window else 1
    size = max(1, PIECE // (area * left[0].numel()))
    cross, pull, gram, count = (torch.zeros(()) for _ in range(4))
    errors = [None] * len(left) if error is None else error.split(size)
    for ours, theirs, e in zip(left.split(size), right.split(size), errors, strict=False):
        rows = m.rows(theirs, shape)
        gram = gram + (rows.mT @ rows).double()
        cross = cross + (m.rows(ours, shape).mT @ rows).double()
        pull = pull if e is None else pull + (m.results(e).mT @ rows).double()
        count = count + rows.shape[1]
    return (matrix @ cross + pull) / count, gram.div_(count)
