"""One server step: deltas -> rule -> one delta -> new model.

Everything is a lazy mapping of named tensors that answers block by block: the aggregate of n deltas is one, base plus
scaled aggregate is another. Whoever consumes it (a file writer, a dict, the federated server) asks for blocks, so
streaming, in-memory and federated results are the same bits by construction.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor

from deltafl.algebra.reductions import gram_matrix, magnitude_thresholds
from deltafl.algebra.streaming import OnElements, ignore
from deltafl.algebra.tensors import (
    Tensors,
    block_of,
    blocks,
    device_of,
    dtype_of,
    read_into,
    round_once,
    shape_of,
)
from deltafl.errors import DeltaflError, shorten
from deltafl.rules.rule import LinearRule, Rule, Source, Stats, Transform, check_rule, core_of
from deltafl.rules.weights import Weights, WeightsLike, as_weights, shares


@dataclass(frozen=True)
class Update:
    """A delta and what is known of the training behind it: a task vector, or a client's update."""

    delta: Tensors
    source: Source


@dataclass
class Rows:
    """The transformed, signed deltas, block by block: what reductions and combinations see.

    names: the tensors that all deltas share, in the order of the first. dtype: float32, or float64 to be exact.
    """

    updates: Sequence[Update]
    weights: Weights
    dtype: torch.dtype = torch.float32
    transforms: tuple[tuple[Transform, Mapping[str, Sequence[float]] | None], ...] = ()
    names: tuple[str, ...] = field(init=False)
    device: torch.device = field(init=False)
    weights_of: Mapping[str, tuple[float, ...]] = field(init=False)

    def __post_init__(self) -> None:
        first = self.updates[0]
        self.names = tuple(first.delta)
        self.weights_of = {
            name: self.weights.of(name) for name in self.names
        }  # once: blocks are many
        self.device = device_of(first.delta, self.names[0]) if self.names else torch.device("cpu")
        problems = []
        for update in self.updates[1:]:
            if set(update.delta) != set(first.delta):
                odd = sorted(set(update.delta) ^ set(first.delta))
                problems.append(
                    f'"{update.source.name}" and "{first.source.name}" differ in tensors: {shorten(odd)}'
                )
                continue
            for name in self.names:
                a, b = shape_of(first.delta, name), shape_of(update.delta, name)
                if a != b:
                    problems.append(
                        f'tensor "{name}" is {b} in "{update.source.name}", {a} in "{first.source.name}"'
                    )
        if problems:
            raise DeltaflError(*problems)

    def shape(self, name: str) -> tuple[int, ...]:
        return shape_of(self.updates[0].delta, name)

    def row(self, i: int, name: str, start: int, stop: int) -> Tensor:
        """Delta i, transformed, (stop - start,). A tensor of its own: the caller may overwrite it."""
        delta = self.updates[i].delta
        block = block_of(delta, name, start, stop)
        block = block.to(self.dtype, copy=not getattr(delta, "fresh_blocks", False))
        return self._transformed(block, i, name, start)

    def block(self, name: str, start: int, stop: int) -> Tensor:
        """All deltas, (n, stop - start)."""
        block = torch.empty((len(self.updates), stop - start), dtype=self.dtype, device=self.device)
        for i, row in enumerate(block.unbind()):
            self.read(i, name, start, row)
        return block

    def read(self, i: int, name: str, start: int, out: Tensor) -> None:
        """Write delta i, transformed, from element `start` on, into `out`."""
        read_into(self.updates[i].delta, name, start, start + len(out), out)
        transformed = self._transformed(out, i, name, start)
        if transformed is not out:
            out.copy_(transformed)

    def _transformed(self, row: Tensor, i: int, name: str, start: int) -> Tensor:
        """Delta i from element `start` on, signed and transformed; `row` may be overwritten."""
        if self.weights_of[name][i] < 0:
            row.neg_()
        for transform, thresholds in self.transforms:
            threshold = thresholds[name][i] if thresholds else 0.0
            row = transform.apply(row, i, name, start, threshold)
        return row

    def refuse_nonfinite(self, name: str, start: int, stop: int) -> None:
        """Raise DeltaflError that names tensor and model if a delta has NaN or Inf in this block."""
        for i, update in enumerate(self.updates):
            bad = ~torch.isfinite(self.row(i, name, start, stop))
            if bad.any():
                at = start + int(bad.nonzero()[0, 0])
                raise DeltaflError(
                    f'model "{update.source.name}": tensor "{name}" differs from the base by NaN or Inf '
                    f"(element {at}); leave the model or, with --exclude, the tensor out"
                )


class Aggregate(Mapping[str, Tensor]):
    """R(delta_1 .. delta_n) as a lazy mapping; reductions that the rule declares are computed when it is made.

    `report` holds what the rule found on the way (coefficients, kept fractions), for the record.
    """

    fresh_blocks = True

    def __init__(
        self,
        rule: Rule,
        updates: Sequence[Update],
        weights: WeightsLike = None,
        *,
        dtype: torch.dtype = torch.float32,
        threads: int = 1,
        on_elements: OnElements = ignore,
    ) -> None:
        sources = tuple(u.source for u in updates)
        check_rule(rule, sources)
        self.weights = as_weights(weights, len(updates))
        self.report: dict[str, object] = {}
        self._core = core_of(rule)
        rows = Rows(updates, self.weights, dtype)
        for transform in rule.transforms:
            thresholds = None
            if transform.density is not None:
                thresholds, kept = magnitude_thresholds(
                    rows, transform.density, transform.per_tensor, threads, on_elements
                )
                self.report["kept_fraction"] = dict(
                    zip((s.name for s in sources), kept, strict=True)
                )
            rows = Rows(updates, self.weights, dtype, (*rows.transforms, (transform, thresholds)))
        self._rows = rows
        self._known = frozenset(rows.names)
        self._stats = Stats(sources)
        self._is_linear = isinstance(
            self._core, LinearRule
        )  # asked once: a protocol's answer takes long
        if isinstance(self._core, LinearRule):
            if self._core.needs_gram:
                self._stats = Stats(sources, gram_matrix(rows, threads, on_elements))
            self._coefficients: dict[tuple[float, ...], tuple[float, ...]] = {}
            if any(self.weights.default):
                self.report["coefficients"] = list(self._linear(self.weights.default))

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows.names)

    def __len__(self) -> int:
        return len(self._rows.names)

    def __contains__(self, name: object) -> bool:
        return name in self._known  # Mapping's own would compute the tensor

    def __getitem__(self, name: str) -> Tensor:
        shape = self.shape(name)
        numel = math.prod(shape)
        parts = [self.block(name, start, stop) for start, stop in blocks(numel)]
        return (torch.cat(parts) if parts else torch.empty(0, dtype=self._rows.dtype)).reshape(
            shape
        )

    def shape(self, name: str) -> tuple[int, ...]:
        return self._rows.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return self._rows.dtype

    def block(self, name: str, start: int, stop: int) -> Tensor:
        """R on flat elements [start, stop) of one tensor, in float32 (float64 if exact)."""
        weights = self._rows.weights_of[name]
        if not any(weights):
            return torch.zeros(stop - start, dtype=self._rows.dtype)
        if self._is_linear:
            total = self._combination(self._linear(weights), name, start, stop)
            checked = total.sum()
        else:
            stack = self._rows.block(name, start, stop)
            checked = stack.sum()
            total = self._core.combine(stack, shares(weights))  # type: ignore[union-attr]
        if not math.isfinite(checked):
            self._rows.refuse_nonfinite(name, start, stop)
        return total

    def _combination(
        self, coefficients: Sequence[float], name: str, start: int, stop: int
    ) -> Tensor:
        """sum_i c_i delta_i, in the order of the models; equal coefficients multiply the sum, once."""
        equal = len(set(coefficients)) == 1
        total, other = torch.empty(
            (2, stop - start), dtype=self._rows.dtype, device=self._rows.device
        )
        for i, coefficient in enumerate(coefficients):
            row = other if i else total
            self._rows.read(i, name, start, row)
            if not equal:
                row.mul_(coefficient)
            if i:
                total.add_(row)
        return total.mul_(coefficients[0]) if equal else total

    def _linear(self, weights: tuple[float, ...]) -> tuple[float, ...]:
        if weights not in self._coefficients:
            core = cast(LinearRule, self._core)
            p = torch.tensor(shares(weights), dtype=torch.float64)
            self._coefficients[weights] = tuple(core.coefficients(self._stats, p).tolist())
        return self._coefficients[weights]


class Stepped(Mapping[str, Tensor]):
    """theta = theta0 + scale * R as a lazy mapping, rounded once to the base's dtype, or to `dtype`.

    scale: server_lr, or a function of the tensor's name (see `sum_scale`). What the update does not hold, and what
    is not floating-point, is the base's own tensor. `working`: the base's blocks in the precision of the arithmetic,
    where they are at hand (see `checkpoint.Latest`).
    """

    fresh_blocks = True

    def __init__(
        self,
        base: Tensors,
        update: Tensors,
        scale: float | Callable[[str], float],
        *,
        dtype: torch.dtype | None = None,
        working: Tensors | None = None,
    ) -> None:
        missing = [n for n in update if n not in base]
        if missing:
            raise DeltaflError(f"the base lacks tensors of the update: {shorten(missing)}")
        self._base, self._update, self._dtype = base, update, dtype
        self._scale = scale if callable(scale) else lambda name: scale
        self._working = base if working is None else working

    def __iter__(self) -> Iterator[str]:
        return iter(self._base)

    def __len__(self) -> int:
        return len(self._base)

    def _moves(self, name: str) -> bool:
        return name in self._update and dtype_of(self._base, name).is_floating_point

    def __getitem__(self, name: str) -> Tensor:
        if not self._moves(name):
            return self._base[name].to(self.dtype(name))
        shape = self.shape(name)
        parts = [self.block(name, start, stop) for start, stop in blocks(math.prod(shape))]
        return (torch.cat(parts) if parts else torch.empty(0, dtype=self.dtype(name))).reshape(
            shape
        )

    def shape(self, name: str) -> tuple[int, ...]:
        return shape_of(self._base, name)

    def dtype(self, name: str) -> torch.dtype:
        own = dtype_of(self._base, name)
        return self._dtype if self._dtype and own.is_floating_point else own

    def block(self, name: str, start: int, stop: int) -> Tensor:
        """The new model's flat elements [start, stop) of one tensor."""
        if not self._moves(name):
            return self._rounded(block_of(self._base, name, start, stop), name)
        update = block_of(self._update, name, start, stop)
        fresh = getattr(self._update, "fresh_blocks", False)
        update = update.mul_(self._scale(name)) if fresh else update * self._scale(name)
        base = block_of(self._working, name, start, stop).to(update.device)
        update = update.to(torch.promote_types(update.dtype, base.dtype))
        return self._rounded(update.add_(base), name)

    def _rounded(self, values: Tensor, name: str) -> Tensor:
        rounded = round_once(values, self.dtype(name))
        if rounded.dtype == torch.float16 and not torch.isfinite(rounded).all():
            raise DeltaflError(
                f'tensor "{name}": values do not fit into float16; '
                "choose --dtype float32 or bfloat16, or a smaller coefficient"
            )
        return rounded


def sum_scale(weights: Weights, scaling_coef: float) -> Callable[[str], float]:
    """The scale that turns lambda, which multiplies sum_i w_i delta_i, into server_lr: lambda * sum_i |w_i|."""
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
    """Stream (name, theta0 + server_lr * R) in the base's dtypes and order; integer tensors are the base's. Pure."""
    yield from Stepped(base, Aggregate(rule, updates, weights), server_lr).items()
