"""What a search chooses from: methods, their parameters and lambdas, as rows, and updates that candidates share."""

import hashlib
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from deltafl.algebra.aggregate import Aggregate, Weights
from deltafl.algebra.streaming import Unit, visit
from deltafl.errors import DeltaflError
from deltafl.rules.rule import Rule, Source, build_rule, check_rule, load_rules


@dataclass(frozen=True)
class Row:
    """One candidate: its scale in both conventions, mean score per task on validation, and the metric's value.

    same_as: an earlier row whose model has the same bits, so that it was not evaluated again. evaluated: validation
    examples, over all tasks, that the row was evaluated on; None: on none of its own. dropped_at: the look of the race
    after which it was dropped, so that `val` and `value` are estimates from those examples; None: they are exact.
    """

    method: str
    params: Mapping[str, Any]
    scaling_coef: float
    server_lr: float
    val: Mapping[str, float] = field(default_factory=dict)
    value: float = 0.0
    same_as: str | None = None
    evaluated: int | None = None
    dropped_at: int | None = None

    @property
    def label(self) -> str:
        """`fedgma rho=0.6 lambda=0.3`, in full precision: no other candidate has it."""
        return " ".join(
            [
                self.method,
                *(f"{k}={v}" for k, v in self.params.items()),
                f"lambda={self.scaling_coef}",
            ]
        )

    @property
    def rank(self) -> tuple[float, float]:
        """What decides between rows: an exact value goes before an estimate; NaN (an overflow) is below anything."""
        return self.dropped_at or math.inf, -math.inf if math.isnan(self.value) else self.value

    def twin_of(self, other: "Row") -> "Row":
        """This row with what is known of another one whose model has the same bits."""
        return replace(
            self,
            val=other.val,
            value=other.value,
            same_as=other.same_as or other.label,
            dropped_at=other.dropped_at,
        )


def grid_of(method: str, params: Mapping[str, Any], norms: Sequence[float]) -> list[dict[str, Any]]:
    """All combinations of a method's parameters: a list is a grid; the rule adds its own (`Rule.grid`).

    Raises DeltaflError if a list is empty.
    """
    tried = load_rules()[method].grid(params, norms)
    given = {**params, **{k: v for k, v in tried.items() if k not in params}}
    for key, value in given.items():
        if value == []:
            raise DeltaflError(
                f"methods: {method}: {key} is an empty list; name at least one value"
            )
    axes = [
        [(k, v) for v in (value if isinstance(value, list) else [value])]
        for k, value in given.items()
    ]
    return [dict(point) for point in itertools.product(*axes)]


def check_methods(
    methods: Sequence[tuple[str, Mapping[str, Any]]],
    lambdas: Sequence[float],
    sources: Sequence[Source],
) -> None:
    """Raise DeltaflError with every reason why these methods and coefficients cannot be searched with these models."""
    problems = [
        f"scaling_coefs: {value} is not a finite number"
        for value in lambdas
        if not math.isfinite(value)
    ]
    names = [method for method, _ in methods]
    twice = sorted({name for name in names if names.count(name) > 1})
    problems += [
        f"methods: {name} is named twice; give one entry, whose parameters are lists"
        for name in twice
    ]
    for method, params in methods:
        try:
            for point in grid_of(method, params, (1.0, 1.0)):
                check_rule(build_rule(method, point), sources)
        except DeltaflError as error:
            problems += [p for p in error.problems if p not in problems]
    if problems:
        raise DeltaflError(*problems)


@dataclass
class Held:
    """An update that candidates share; `tensors` is None where it has to be made again."""

    aggregate: Aggregate
    digest: str
    tensors: dict[str, Tensor] | None


@dataclass
class Shelf:
    """Updates kept in memory as long as they fit into `room` bytes, else made again when they are asked for."""

    room: int
    threads: int

    def put(self, aggregate: Aggregate, tensors: dict[str, Tensor], digest: str) -> Held:
        """Hold an update."""
        held = Held(aggregate, digest, None)
        self._keep(held, tensors)
        return held

    def get(self, held: Held) -> dict[str, Tensor]:
        """The update's tensors."""
        if held.tensors is not None:
            return held.tensors
        tensors = materialize(held.aggregate, self.threads)[0]
        self._keep(held, tensors)
        return tensors

    def drop(self, held: Held) -> None:
        """Let go of an update that no candidate needs any more."""
        if held.tensors is not None:
            self.room += size_of(held.tensors)
            held.tensors = None

    def _keep(self, held: Held, tensors: dict[str, Tensor]) -> None:
        if size_of(tensors) <= self.room:
            self.room -= size_of(tensors)
            held.tensors = tensors


def size_of(tensors: Mapping[str, Tensor]) -> int:
    """Bytes."""
    return sum(t.numel() * t.element_size() for t in tensors.values())


def factors(weights: Weights, scaling_coef: float) -> tuple[float, ...]:
    """The float32 factors that a coefficient stands for: where they are equal, one update gives one model."""
    totals = [
        sum(map(abs, row)) for row in (weights.default, *(row for _, row in weights.patterns))
    ]
    return tuple(
        torch.tensor([scaling_coef * total for total in totals], dtype=torch.float32).tolist()
    )


Planned = tuple[Row, tuple[str, tuple[float, ...]], Aggregate, dict[str, Tensor]]
"""A row, what tells its model's bits (digest of the update, factors), the update as a rule and as tensors."""


def planned(
    methods: Sequence[tuple[str, Mapping[str, Any]]],
    lambdas: Sequence[float],
    aggregate: Callable[[Rule], Aggregate],
    norms: Sequence[float],
    *,
    native_scale: bool,
    threads: int,
) -> Iterator[Planned]:
    """Every candidate but the base, in order; an update is computed once per method and parameters. Coefficient 0 is
    the base whatever the update.
    """
    for method, params in methods:
        for point in grid_of(method, params, norms):
            rule = build_rule(method, point)
            lazy = aggregate(rule)
            update, digest = materialize(lazy, threads)
            total = sum(map(abs, lazy.weights.default))
            for value in lambdas:
                coef = (
                    value / total if native_scale and rule.traits.native_scale == "mean" else value
                )
                yield (
                    Row(method, point, coef, coef * total),
                    (digest, factors(lazy.weights, coef)),
                    lazy,
                    update,
                )


def materialize(aggregate: Aggregate, threads: int) -> tuple[dict[str, Tensor], str]:
    """The update as tensors in memory, float32, and a digest of its bits."""
    tensors = {n: torch.empty(aggregate.spec(n).shape) for n in aggregate}
    flat = {n: t.reshape(-1) for n, t in tensors.items()}

    def fill(unit: Unit) -> None:
        for name, start, stop in unit:
            aggregate.read(name, start, stop, flat[name][start:stop])

    specs = {name: aggregate.spec(name) for name in aggregate}
    for _ in visit(specs, fill, threads, forks=False, whole=aggregate.whole):
        pass
    digest = hashlib.sha256()
    for tensor in flat.values():
        digest.update((tensor + 0.0).numpy())  # type: ignore[arg-type]  # + 0.0: -0 is 0
    return tensors, digest.hexdigest()
