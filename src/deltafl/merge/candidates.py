"""What a search chooses from: methods with their parameters, scaled by coefficients, as rows."""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from deltafl.errors import DeltaflError, attempt
from deltafl.rules.building import build_rule, load_rules
from deltafl.rules.rule import Source, check_rule

Method: TypeAlias = tuple[str, Mapping[str, object]]
"""A rule by name and its parameters, of which a list is a grid."""


@dataclass(frozen=True)
class Row:
    """One candidate, and how it did on validation data.

    scaling_coef, server_lr: its scale in both conventions. val: task -> mean score; value: of the
    search's metric. same_as: an earlier row whose model has the same bits, so that it was not
    evaluated again. evaluated: examples, over all tasks, that the row was evaluated on; None: on
    none of its own. dropped_at: the look of a race after which it was dropped, so that `val` and
    `value` are estimates; None: they are exact.
    """

    method: str
    params: Mapping[str, object]
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
        params = [f"{key}={value}" for key, value in self.params.items()]
        return " ".join([self.method, *params, f"lambda={self.scaling_coef}"])

    @property
    def rank(self) -> tuple[float, float]:
        """What decides between rows: exact goes before estimated, and NaN is below any number."""
        return self.dropped_at or math.inf, -math.inf if math.isnan(self.value) else self.value


BASE = Row("base", {}, 0.0, 0.0)


def grid_of(
    method: str, params: Mapping[str, object], norms: Sequence[float]
) -> list[dict[str, object]]:
    """All combinations of a method's parameters: a list is a grid, and the rule has one of its own.

    Raises DeltaflError if a list is empty.
    """
    given = {**load_rules()[method].grid(params, norms), **params}
    for key, value in given.items():
        if value == []:
            raise DeltaflError(
                f"methods: {method}: {key} is an empty list; name at least one value"
            )
    axes = [value if isinstance(value, list) else [value] for value in given.values()]
    return [dict(zip(given, point, strict=True)) for point in itertools.product(*axes)]


def check_methods(methods: Sequence[Method], sources: Sequence[Source]) -> None:
    """Raise DeltaflError with every reason why these cannot be searched with these models."""
    problems: list[str] = []
    for method, params in methods:
        for point in attempt(problems, grid_of, method, params, (1.0, 1.0)) or ():
            if rule := attempt(problems, build_rule, method, point):
                attempt(problems, check_rule, rule, sources)
    if problems:
        raise DeltaflError(*dict.fromkeys(problems))
