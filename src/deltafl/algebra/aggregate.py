"""One server step: deltas -> rule -> one delta -> new model.

Everything is lazy and read block by block: the aggregate of n deltas, and base plus scaled
aggregate. Whoever consumes it (a file writer, a dict, the federated server) asks for blocks, so
streaming, in-memory and federated results are the same bits by construction.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain

import torch
from torch import Tensor

from deltafl.algebra.deltas import Deltas, Update
from deltafl.algebra.reductions import gram_matrix, magnitude_thresholds
from deltafl.algebra.tensors import Lazy, Spec, Tensors, lazy, memory_like, round_once
from deltafl.errors import DeltaflError, shorten
from deltafl.pool import one_thread
from deltafl.progress import OnProgress, ignore
from deltafl.rules.rule import (
    RUNNING,
    CoordinateRule,
    LinearRule,
    Rule,
    Stats,
    TensorRule,
    check_rule,
    refuse_examples,
)
from deltafl.rules.weights import WeightsLike, as_weights, shares


class Aggregate(Lazy):
    """R(delta_1 .. delta_n), in float32, or float64 to be exact; of running statistics sum_i p_i
    delta_i, with examples in p if the rule weighs them.

    Reductions that the rule declares are computed when it is made. `report` holds what the rule
    found on the way (coefficients, kept fractions), for the record. base: theta_0, for a rule of
    whole weights.
    """

    def __init__(
        self,
        rule: Rule,
        updates: Sequence[Update],
        weights: WeightsLike = None,
        *,
        base: Tensors | None = None,
        dtype: torch.dtype = torch.float32,
        threads: int = 1,
        on_progress: OnProgress = ignore,
    ) -> None:
        sources = tuple(u.source for u in updates)
        refuse_examples(rule)
        check_rule(rule, sources)
        self.weights = as_weights(weights, len(updates))
        self.report: dict[str, object] = {}
        self._core = core = rule.core
        self._own: tuple[str, Rule] = "", core
        weighs = core.weighs_examples
        self._sizes = [s.num_examples or 1 if weighs else 1 for s in sources]
        self._last: dict[str, Tensor] = {}
        self._deltas = Deltas(updates, self.weights, dtype)
        self.names = self._deltas.specs
        self._base = lazy(base or {})
        if isinstance(core, TensorRule) and core.space == "weights":
            self._refuse_lacking(core.name)
        for transform in rule.transforms:
            thresholds = None
            if transform.density is not None:
                thresholds, kept = magnitude_thresholds(
                    self._deltas, transform.density, transform.per_tensor, threads, on_progress
                )
                names = (s.name for s in sources)
                self.report["kept_fraction"] = dict(zip(names, kept, strict=True))
            self._deltas.add(transform, thresholds)
        self.whole = isinstance(core, TensorRule) or self._deltas.whole
        if isinstance(core, LinearRule):
            gram = torch.empty(0, 0)
            if core.needs_gram:
                gram = gram_matrix(self._deltas, threads, on_progress)
            stats = Stats(sources, gram)
            self._coefficients = {
                row: core.coefficients(
                    stats, torch.tensor(shares(row), dtype=torch.float64)
                ).tolist()
                for row in self.weights.values()
                if any(row)
            }
            self.report["coefficients"] = self._coefficients.get(self.weights["*"])

    def _refuse_lacking(self, rule: str) -> None:
        """Raise DeltaflError for what a rule of whole weights cannot do without, or with."""
        if missing := [name for name in self.names if name not in self._base]:
            raise DeltaflError(
                f"{rule} merges whole weights: it needs the base, which lacks {shorten(missing)}"
            )
        if min(chain.from_iterable(self.weights.values())) < 0:
            raise DeltaflError(
                f"{rule} merges whole weights: a model's weight must not be negative"
            )

    def spec(self, name: str) -> Spec:
        return self._deltas.specs[name]

    def terms(self, name: str) -> list[tuple[float, Lazy]] | None:
        """Of a linear rule c_i and delta_i, whose products it adds up; None for another."""
        deltas, weights = self._deltas, self._deltas.weights_of[name]
        if not isinstance(self._core, LinearRule) or deltas.transforms or not any(weights):
            return None
        c = self._coefficients[weights]
        return [
            (math.copysign(one, weight * one), lazy(update.delta))
            for one, weight, update in zip(c, weights, deltas.updates, strict=True)
            if weight
        ]

    def read(self, name: str, start: int, stop: int, out: Tensor) -> None:
        weights, spec = self._deltas.weights_of[name], self.spec(name)
        running = name.endswith(RUNNING)
        if not any(weights):
            out.zero_()
        elif running or isinstance(self._core, LinearRule):
            total = memory_like(out, spec.dtype, spec.device)
            known = zip(weights, self._sizes, strict=True)
            c = shares([w * size for w, size in known]) if running else self._coefficients[weights]
            self._sum(c, name, start, total)
            self._deltas.check_finite(total, name, start, stop)
            out.copy_(total)
        elif isinstance(self._core, TensorRule):
            out.copy_(self._held(name, stop)[start:stop])
        else:
            out.copy_(self._combined(name, start, stop, (stop - start,)))

    def _held(self, name: str, stop: int) -> Tensor:
        """R of a whole tensor, flat; held until its end is read."""
        spec, last = self.spec(name), self._last
        if name not in last:
            last.clear()
            try:
                with one_thread():
                    last[name] = self._combined(name, 0, spec.numel, spec.shape).reshape(-1)
            except torch.linalg.LinAlgError:
                raise DeltaflError(
                    f'tensor "{name}": {self._core.name}: its singular values cannot be computed; '
                    "leave it out with --exclude, or choose another method"
                ) from None
        return last[name] if stop < spec.numel else last.pop(name)

    def _combined(self, name: str, start: int, stop: int, shape: tuple[int, ...]) -> Tensor:
        """What the rule makes of elements [start, stop) of the deltas, in this shape."""
        if self._own[0] != name:
            self._own = name, self._core.at(name)
        core = self._own[1]
        assert isinstance(core, CoordinateRule | TensorRule)
        weights = self._deltas.weights_of[name]
        counted = [i for i, weight in enumerate(weights) if weight]
        stack = self._deltas.stack(name, start, stop, counted)
        self._deltas.check_finite(stack, name, start, stop)
        p, deltas = shares([weights[i] for i in counted]), stack.view(len(stack), *shape)
        if isinstance(core, TensorRule) and core.space == "weights":
            base = self._base.block(name, start, stop, torch.float64).to(stack.device).view(shape)
            result = core.combine(torch.cat([base[None], base + deltas]), p)
            result = (result - base).to(stack.dtype)
        else:
            result = core.combine(deltas, p)
        if result.shape != shape or result.dtype != stack.dtype:
            raise DeltaflError(
                f"{type(core).__name__}: combine gives {tuple(result.shape)} {result.dtype} "
                f"for deltas of {tuple(shape)} {stack.dtype}; a rule keeps both"
            )
        return result

    def _sum(self, coefficients: Sequence[float], name: str, start: int, total: Tensor) -> None:
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


class Stepped(Lazy):
    """theta = theta0 + scale * R, rounded once to the base's dtype, or to `dtype`.

    scale: server_lr, or a function of the tensor's name; of running statistics within 0 and 1. What
    the update does not hold, and what is not floating-point, is the base's own. of_base: what
    multiplies theta0, by the tensor's name; 1 where it is not there.
    """

    def __init__(
        self,
        base: Tensors,
        update: Tensors,
        scale: float | Callable[[str], float],
        *,
        dtype: torch.dtype | None = None,
        of_base: Mapping[str, float] | None = None,
    ) -> None:
        self._base, self._update, self._dtype = lazy(base), lazy(update), dtype
        self._of_base = of_base or {}
        self.names, self.whole = self._base.names, self._update.whole
        if missing := [n for n in self._update if n not in self.names]:
            raise DeltaflError(f"the base lacks tensors of the update: {shorten(missing)}")
        of = scale if callable(scale) else lambda name: scale
        self._scale = lambda n: min(1.0, max(0.0, of(n))) if n.endswith(RUNNING) else of(n)

    def spec(self, name: str) -> Spec:
        spec = self._base.spec(name)
        floats = self._dtype and spec.dtype.is_floating_point
        return spec._replace(dtype=self._dtype) if floats else spec

    def read(self, name: str, start: int, stop: int, out: Tensor) -> None:
        own, dtype = self._base.spec(name).dtype, self.spec(name).dtype
        if name in self._update and own.is_floating_point:
            update = self._update.spec(name)
            values = memory_like(out, update.dtype, update.device)
            if self.whole:  # a block is a tensor more
                self._update.read(name, start, stop, values)
                values.mul_(self._scale(name))
            else:
                block = self._update.block(name, start, stop, update.dtype)
                torch.mul(block, self._scale(name), out=values)
            wide = torch.promote_types(update.dtype, own)
            base = self._base.block(name, start, stop, wide)
            values = values.to(wide).add_(base.to(values.device), alpha=self._of_base.get(name, 1))
        elif name in self._of_base and own.is_floating_point:
            wide = torch.promote_types(torch.float32, own)
            values = self._base.block(name, start, stop, wide) * self._of_base[name]
        else:
            values = self._base.block(name, start, stop)
        once = values.dtype == torch.float32 and out.dtype == dtype != torch.float16
        rounded = values if once else round_once(values, dtype)  # `copy_` rounds as well
        if dtype == torch.float16 and not torch.isfinite(rounded).all():
            raise DeltaflError(
                f'tensor "{name}": values do not fit into float16; '
                "choose --dtype float32 or bfloat16, or a smaller coefficient"
            )
        out.copy_(rounded)


def aggregate(
    rule: Rule,
    updates: Sequence[Update],
    weights: WeightsLike = None,
    base: Tensors | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """Stream (name, R(delta_1 .. delta_n)) in float32, in the order of the first delta. Pure.

    base: theta_0, for a rule of whole weights.
    """
    yield from Aggregate(rule, updates, weights, base=base).items()


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
    yield from Stepped(base, Aggregate(rule, updates, weights, base=base), server_lr).items()
