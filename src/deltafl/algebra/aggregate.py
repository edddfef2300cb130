"""One server step: deltas -> rule -> one delta -> new model.

Everything is lazy and read block by block: the aggregate of n deltas, and base plus scaled
aggregate. Whoever consumes it (a file writer, a dict, the federated server) asks for blocks, so
streaming, in-memory and federated results are the same bits by construction.
"""

import math
import threading
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from deltafl.algebra.deltas import Deltas, Update
from deltafl.algebra.reductions import gram_matrix, magnitude_thresholds
from deltafl.algebra.tensors import Lazy, Spec, Tensors, lazy, memory_like, round_once
from deltafl.errors import DeltaflError, shorten
from deltafl.pool import one_thread
from deltafl.progress import OnProgress, ignore
from deltafl.rules.rule import CoordinateRule, LinearRule, Rule, Stats, TensorRule, check_rule
from deltafl.rules.weights import Weights, WeightsLike, as_weights, shares


class Aggregate(Lazy):
    """R(delta_1 .. delta_n), in float32, or float64 to be exact.

    Reductions that the rule declares are computed when it is made. `report` holds what the rule
    found on the way (coefficients, kept fractions), for the record.
    """

    def __init__(
        self,
        rule: Rule,
        updates: Sequence[Update],
        weights: WeightsLike = None,
        *,
        dtype: torch.dtype = torch.float32,
        threads: int = 1,
        on_progress: OnProgress = ignore,
    ) -> None:
        sources = tuple(u.source for u in updates)
        check_rule(rule, sources)
        self.weights = as_weights(weights, len(updates))
        self.report: dict[str, object] = {}
        self._core = rule.core
        self.whole = isinstance(self._core, TensorRule)
        self._last = _LastTensor()
        self._deltas = Deltas(updates, self.weights, dtype)
        self.names = self._deltas.specs
        for transform in rule.transforms:
            thresholds = None
            if transform.density is not None:
                thresholds, kept = magnitude_thresholds(
                    self._deltas, transform.density, transform.per_tensor, threads, on_progress
                )
                names = (s.name for s in sources)
                self.report["kept_fraction"] = dict(zip(names, kept, strict=True))
            self._deltas.transform(transform, thresholds)
        self._coefficients: dict[tuple[float, ...], tuple[float, ...]] = {}
        if isinstance(self._core, LinearRule):
            gram = torch.empty(0, 0, dtype=torch.float64)
            if self._core.needs_gram:
                gram = gram_matrix(self._deltas, threads, on_progress)
            self._stats = Stats(sources, gram)
            if any(self.weights.default):
                self.report["coefficients"] = list(self._linear(self._core, self.weights.default))

    def spec(self, name: str) -> Spec:
        return self._deltas.specs[name]

    def read(self, name: str, start: int, stop: int, out: Tensor) -> None:
        weights, spec = self._deltas.weights_of[name], self.spec(name)
        if not any(weights):
            out.zero_()
            return
        if isinstance(self._core, LinearRule):
            total = memory_like(out, spec.dtype, spec.device)
            self._combine(self._linear(self._core, weights), name, start, total)
            self._check(total, name, start, stop)
        elif isinstance(self._core, CoordinateRule):
            stack = self._deltas.stack(name, start, stop)
            self._check(stack, name, start, stop)
            total = self._core.combine(stack, shares(weights))
            self._refuse_other(total, out.shape, spec.dtype)
        else:
            total = self._whole(name, weights)[start:stop]
            if stop == spec.numel:
                self._last.name = self._last.tensor = None
        if total is not out:
            out.copy_(total)

    def _whole(self, name: str, weights: Sequence[float]) -> Tensor:
        """R of a whole tensor, flat; held until its end is read."""
        last, spec = self._last, self.spec(name)
        if last.name != name or last.tensor is None:
            last.name = last.tensor = None
            counted = [i for i, w in enumerate(weights) if w]
            stack = self._deltas.stack(name, 0, spec.numel, counted)
            self._check(stack, name, 0, spec.numel)
            assert isinstance(self._core, TensorRule)
            try:
                p = [share for share in shares(weights) if share]
                with one_thread():
                    tensor = self._core.combine(stack.view(len(stack), *spec.shape), p)
            except torch.linalg.LinAlgError:
                raise DeltaflError(
                    f'tensor "{name}": {self._core.name}: its singular values cannot be computed; '
                    "leave it out with --exclude, or choose another method"
                ) from None
            self._refuse_other(tensor, spec.shape, spec.dtype)
            last.name, last.tensor = name, tensor.reshape(-1)
        return last.tensor

    def _check(self, values: Tensor, name: str, start: int, stop: int) -> None:
        if not math.isfinite(values.sum()):
            self._deltas.refuse_nonfinite(name, start, stop)

    def _refuse_other(self, result: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        if result.shape != shape or result.dtype != dtype:
            raise DeltaflError(
                f"{type(self._core).__name__}: combine gives {tuple(result.shape)} {result.dtype} "
                f"for deltas of {tuple(shape)} {dtype}; a rule keeps both"
            )

    def _combine(self, coefficients: Sequence[float], name: str, start: int, total: Tensor) -> None:
        """total = sum_i c_i delta_i in the models' order; equal coefficients multiply once."""
        equal = len(set(coefficients)) == 1
        other = torch.empty_like(total)
        for i, coefficient in enumerate(coefficients):
            row = other if i else total
            self._deltas.read(i, name, start, row)
            if not equal:
                row.mul_(coefficient)
            if i:
                total.add_(row)
        if equal:
            total.mul_(coefficients[0])

    def _linear(self, core: LinearRule, weights: tuple[float, ...]) -> tuple[float, ...]:
        if weights not in self._coefficients:
            p = torch.tensor(shares(weights), dtype=torch.float64)
            self._coefficients[weights] = tuple(core.coefficients(self._stats, p).tolist())
        return self._coefficients[weights]


class _LastTensor(threading.local):
    """The tensor that a thread combined last."""

    name: str | None = None
    tensor: Tensor | None = None


class Stepped(Lazy):
    """theta = theta0 + scale * R, rounded once to the base's dtype, or to `dtype`.

    scale: server_lr, or a function of the tensor's name (see `sum_scale`). What the update does not
    hold, and what is not floating-point, is the base's own.
    """

    def __init__(
        self,
        base: Tensors,
        update: Tensors,
        scale: float | Callable[[str], float],
        *,
        dtype: torch.dtype | None = None,
    ) -> None:
        self._base, self._update, self._dtype = lazy(base), lazy(update), dtype
        self.names, self.whole = self._base.names, self._update.whole
        if missing := [n for n in self._update if n not in self.names]:
            raise DeltaflError(f"the base lacks tensors of the update: {shorten(missing)}")
        self._scale = scale if callable(scale) else lambda name: scale

    def spec(self, name: str) -> Spec:
        spec = self._base.spec(name)
        return spec._replace(dtype=self._dtype) if self._dtype and _floats(spec) else spec

    def read(self, name: str, start: int, stop: int, out: Tensor) -> None:
        if name in self._update and _floats(self._base.spec(name)):
            update = self._update.spec(name)
            values = memory_like(out, update.dtype, update.device)
            self._update.read(name, start, stop, values)
            values.mul_(self._scale(name))
            wide = torch.promote_types(update.dtype, self._base.spec(name).dtype)
            base = self._base.block(name, start, stop, wide)
            values = values.to(wide).add_(base.to(values.device))
        else:
            values = self._base.block(name, start, stop)
        rounded = self._rounded(values, name)
        if rounded is not out:
            out.copy_(rounded)

    def _rounded(self, values: Tensor, name: str) -> Tensor:
        rounded = round_once(values, self.spec(name).dtype)
        if rounded.dtype == torch.float16 and not torch.isfinite(rounded).all():
            raise DeltaflError(
                f'tensor "{name}": values do not fit into float16; '
                "choose --dtype float32 or bfloat16, or a smaller coefficient"
            )
        return rounded


def _floats(spec: Spec) -> bool:
    return spec.dtype.is_floating_point


def sum_scale(weights: Weights, scaling_coef: float) -> Callable[[str], float]:
    """The server_lr that lambda on sum_i w_i delta_i stands for: lambda sum_i |w_i|."""
    return lambda name: scaling_coef * weights.total(name)


def aggregate(
    rule: Rule, updates: Sequence[Update], weights: WeightsLike = None
) -> Iterator[tuple[str, Tensor]]:
    """Stream (name, R(delta_1 .. delta_n)) in float32, in the order of the first delta. Pure."""
    yield from Aggregate(rule, updates, weights).items()


def step(
    base: Tensors,
    updates: Sequence[Update],
    rule: Rule,
    server_lr: float = 1.0,
    weights: WeightsLike = None,
) -> Iterator[tuple[str, Tensor]]:
    """Stream (name, theta0 + server_lr * R) in the base's dtypes and order; integers stay.

    Pure.
    """
    yield from Stepped(base, Aggregate(rule, updates, weights), server_lr).items()
