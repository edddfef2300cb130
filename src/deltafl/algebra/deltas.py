"""Deltas: what local training changed, of one model or stacked for n; read block by block."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from deltafl.algebra.tensors import Lazy, Spec, Tensors, blocks, lazy, memory_like
from deltafl.errors import DeltaflError, shorten
from deltafl.pool import one_thread
from deltafl.rules.rule import RUNNING, Source, Threshold, Transform
from deltafl.rules.weights import Weights, numbers_of

Thresholds: TypeAlias = Mapping[str, Sequence[Threshold]]
"""Tensor -> the threshold of each delta."""


@dataclass(frozen=True)
class Update:
    """A delta and what is known of the training behind it: a task vector, or a client's update."""

    delta: Tensors
    source: Source


class CachedBlocks(Lazy):
    """Other tensors, with the block that was last read in `dtype` kept.

    n differences from one base and the step itself ask for the same block of the base one after the
    other: it is read, converted and brought to `device` once.
    """

    def __init__(
        self,
        tensors: Tensors,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self._tensors, self.dtype, self.device = lazy(tensors), dtype, torch.device(device)
        self.names = self._tensors.names
        self._key, self._block = ("", 0, 0), torch.empty(0)

    def spec(self, name: str) -> Spec:
        return self._tensors.spec(name)._replace(device=self.device)

    def read(self, name: str, start: int, stop: int, out: Tensor) -> None:
        self._tensors.read(name, start, stop, out)

    def block(self, name: str, start: int, stop: int, dtype: torch.dtype | None = None) -> Tensor:
        if dtype != self.dtype:
            return super().block(name, start, stop, dtype)
        if self._key != (name, start, stop):
            self._key = "", 0, 0  # while it is being filled
            if len(self._block) != stop - start:
                self._block = torch.empty(stop - start, dtype=dtype, device=self.device)
            self.read(name, start, stop, self._block)
            self._key = name, start, stop
        return self._block


class Difference(Lazy):
    """delta = tuned - base in float32 or, to be exact, float64: of the tensors that `tuned` has."""

    def __init__(self, base: Tensors, tuned: Tensors, dtype: torch.dtype = torch.float32) -> None:
        self.base, self.tuned, self._dtype = lazy(base), lazy(tuned), dtype
        self.names = self.tuned.names

    def spec(self, name: str) -> Spec:
        return self.base.spec(name)._replace(dtype=self._dtype)

    def read(self, name: str, start: int, stop: int, out: Tensor) -> None:
        base = self.base.block(name, start, stop, self._dtype)
        values = memory_like(out, self._dtype, base.device)
        self.tuned.read(name, start, stop, values)
        values.sub_(base)
        out.copy_(values)


class Deltas:
    """The transformed, signed deltas of n updates: what reductions and combinations see.

    specs: of the tensors that all share, in the order of the first, in the dtype of the arithmetic:
    float32, or float64 to be exact. weights_of: name -> weights, (n,).

    Raises:
        DeltaflError: the updates differ in tensors or shapes.
    """

    def __init__(
        self, updates: Sequence[Update], weights: Weights, dtype: torch.dtype = torch.float32
    ) -> None:
        self.updates = updates
        self._deltas = [lazy(update.delta) for update in updates]
        first = self._deltas[0]
        self.specs = {name: first.spec(name)._replace(dtype=dtype) for name in first}
        self.weights_of = {name: numbers_of(weights, name) for name in first}
        self.transforms: list[tuple[Transform, Thresholds | None]] = []
        names, problems = [update.source.name for update in updates], []
        for other, delta in zip(names, self._deltas, strict=True):
            if odd := sorted(delta.keys() ^ self.specs.keys()):
                problems.append(f'"{other}" and "{names[0]}" differ in tensors: {shorten(odd)}')
            problems += [
                f'tensor "{name}" is {there} in "{other}", {here} in "{names[0]}"'
                for name in self.specs
                if name in delta
                and (there := delta.spec(name).shape) != (here := self.specs[name].shape)
            ]
        if problems:
            raise DeltaflError(*problems)
        self._last: dict[int, tuple[str, Tensor]] = {}

    def add(self, transform: Transform, thresholds: Thresholds | None) -> None:
        """Transform what is read from now on, after what was added before."""
        self.transforms.append((transform, thresholds))
        self._last.clear()

    @property
    def whole(self) -> bool:
        """Whether a transform needs whole tensors; those that were last read are then held."""
        return any(transform.whole for transform, _ in self.transforms)

    def read(self, i: int, name: str, start: int, out: Tensor) -> None:
        """Write delta i, signed and transformed unless it is of running statistics, from `start` on
        into `out`, of our dtype; zeros where its weight is 0, whatever it is.
        """
        if not self.weights_of[name][i]:
            out.zero_()
            return
        if not self.whole:
            self._transform(i, name, start, out)
            return
        spec, stop = self.specs[name], start + len(out)
        if self._last.get(i, ("",))[0] != name:
            held = torch.empty(spec.numel, dtype=spec.dtype, device=spec.device)
            with one_thread():
                self._transform(i, name, 0, held)
            self._last[i] = name, held
        out.copy_(self._last[i][1][start:stop])
        if stop == spec.numel:
            del self._last[i]

    def _transform(self, i: int, name: str, start: int, out: Tensor) -> None:
        self._deltas[i].read(name, start, start + len(out), out)
        if name.endswith(RUNNING):
            return
        if self.weights_of[name][i] < 0:
            out.neg_()
        row = out
        for transform, thresholds in self.transforms:
            threshold = thresholds[name][i] if thresholds else Threshold()
            row = row.view(self.specs[name].shape if transform.whole else -1)
            row = transform.apply(row, i, name, start, threshold)
        out.copy_(row.view(-1))

    def stack(
        self, name: str, start: int, stop: int, models: Sequence[int] | None = None
    ) -> Tensor:
        """The deltas of all models, or of some, (n, stop - start); the caller's own."""
        models = range(len(self.updates)) if models is None else models
        spec = self.specs[name]
        stack = torch.empty((len(models), stop - start), dtype=spec.dtype, device=spec.device)
        for first, last in blocks(stop - start):
            for i, row in zip(models, stack[:, first:last].unbind(), strict=True):
                self.read(i, name, start + first, row)
        return stack

    def check_finite(self, values: Tensor, name: str, start: int, stop: int) -> None:
        """Raise DeltaflError that names tensor and model, or base, if a delta has NaN or Inf there.

        values: what was made of the deltas. They are searched only if its sum is not finite.
        """
        for i, update in enumerate(() if math.isfinite(values.sum()) else self.updates):
            bad = ~torch.isfinite(self.stack(name, start, stop, [i])[0])
            if bad.any():
                at, delta = start + int(bad.nonzero()[0, 0]), update.delta
                if (
                    isinstance(delta, Difference)
                    and not delta.base.block(name, at, at + 1).isfinite()
                ):
                    raise DeltaflError(
                        f'the base: tensor "{name}" holds NaN or Inf (element {at}); give another '
                        "base, or leave the tensor out with --exclude"
                    )
                raise DeltaflError(
                    f'model "{update.source.name}": tensor "{name}" differs from the base by NaN or'
                    f" Inf (element {at}); leave the model or, with --exclude, the tensor out"
                )
