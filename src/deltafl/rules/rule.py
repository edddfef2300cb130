"""What an aggregation rule is: the types that every file in `aggregators/` is written against.

Nothing here or in `aggregators/` imports torch, so that the command line knows every rule and its parameters before
the heavy imports begin; rules speak to tensors through the tensors' own methods.
"""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, cast, runtime_checkable

from deltafl.errors import DeltaflError, did_you_mean
from deltafl.registry import Registry
from deltafl.rules.weights import PerModel

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Source:
    """What is known of the local training behind one delta. None: not known."""

    name: str
    num_examples: int | None = None
    num_steps: int | None = None
    lr: float | None = None
    momentum: float | None = None
    prox_mu: float | None = None


@dataclass(frozen=True)
class Traits:
    """What a rule promises; the law tests hold it to every promise.

    fixed_point: identical deltas come back as they are. odd: R(-d) = -R(d). coordinate_symmetric: permuting
    coordinates commutes. order_free: the order of models matters only by rounding. native_scale: whether the paper
    states the rule as a sum or as a mean of deltas; the code returns a mean either way.
    """

    fixed_point: bool = True
    odd: bool = True
    coordinate_symmetric: bool = True
    order_free: bool = True
    native_scale: Literal["sum", "mean"] = "mean"


@dataclass(frozen=True)
class Stats:
    """What a linear rule may see: the sources, and the Gram matrix (n, n) in float64 if the rule declares it."""

    sources: tuple[Source, ...]
    gram: Tensor | None = None


class Transform(Protocol):
    """A per-delta, block-wise change before anything is reduced or combined (trimming, random dropping).

    `density`: kept fraction whose magnitude threshold the engine finds exactly, or None if no threshold is needed;
    by tensor only if `per_tensor`.
    `per_tensor`: one threshold for each tensor instead of one for the whole delta.
    """

    @property
    def density(self) -> PerModel | None: ...

    @property
    def per_tensor(self) -> bool: ...

    def apply(self, block: Tensor, model: int, name: str, start: int, threshold: float) -> Tensor:
        """The changed block, (m,), of the same dtype; the argument may be overwritten."""
        ...


class Rule(Protocol):
    """Common to all rules. A rule is a frozen dataclass: its fields are its parameters."""

    @property
    def traits(self) -> Traits: ...

    @property
    def transforms(self) -> tuple[Transform, ...]: ...

    @classmethod
    def examples(cls) -> Iterable[Rule]:
        """Instances that the law tests run."""
        ...


@runtime_checkable
class LinearRule(Rule, Protocol):
    """R = sum_i c_i delta_i."""

    needs_gram: bool

    def coefficients(self, stats: Stats, weights: Tensor) -> Tensor:
        """c, (n,) float64, from weights p, (n,) float64, that are >= 0 and sum to 1."""
        ...


@runtime_checkable
class CoordinateRule(Rule, Protocol):
    """R is computed for each coordinate on its own."""

    def combine(self, block: Tensor, weights: Sequence[float]) -> Tensor:
        """(n, m), p >= 0 with sum 1 -> (m,), same dtype; the block may be overwritten."""
        ...


@runtime_checkable
class Checked(Protocol):
    """A rule that can tell from the sources alone that it cannot work."""

    def check(self, sources: Sequence[Source]) -> None:
        """Raise DeltaflError."""
        ...


def core_of(rule: Rule) -> LinearRule | CoordinateRule:
    """The rule that combines: the innermost one of a wrapper such as `Dare(inner=Ties(...))`."""
    while hasattr(rule, "inner"):
        rule = rule.inner  # type: ignore[attr-defined]
    return cast("LinearRule | CoordinateRule", rule)


def check_rule(rule: Rule, sources: Sequence[Source]) -> None:
    """Raise DeltaflError if the rule cannot work with these sources."""
    if not sources:
        raise DeltaflError("no models to merge")
    part: Any = rule
    while part is not None:
        if isinstance(part, Checked):
            part.check(sources)
        part = getattr(part, "inner", None)


RULES: Registry[Any] = Registry("method")


def load_rules() -> Registry[Any]:
    """RULES with every file of `deltafl.rules` imported."""
    package = importlib.import_module("deltafl.rules")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"deltafl.rules.{module.name}")
    return RULES


def parameters(rule: type) -> dict[str, tuple[Any, Any]]:
    """Parameter name -> (type, default or dataclasses.MISSING) of a rule class."""
    hints = typing.get_type_hints(rule)

    def default(field: dataclasses.Field[Any]) -> Any:
        made = field.default_factory is not dataclasses.MISSING
        return field.default_factory() if made else field.default  # type: ignore[misc]

    return {f.name: (hints[f.name], default(f)) for f in dataclasses.fields(rule)}


def build_rule(name: str, params: Mapping[str, Any]) -> Rule:
    """The rule called `name` with these parameters; a rule that wraps another hands on what is not its own.

    Raises DeltaflError for unknown and for missing parameters, all at once.
    """
    rule = load_rules()[name]
    known = parameters(rule)
    own = {k: v for k, v in params.items() if k in known}
    rest = {k: v for k, v in params.items() if k not in known}
    problems: list[str] = []
    if isinstance(own.get("inner"), str):
        try:
            own["inner"] = build_rule(own["inner"], rest)
        except DeltaflError as error:
            problems += error.problems
        rest = {}
    problems += [f'method {name} has no parameter "{k}"; {did_you_mean(k, known)}' for k in rest]
    for key, (_, default) in known.items():
        if default is dataclasses.MISSING and key not in own:
            problems.append(f"method {name} needs --{key.replace('_', '-')}")
    if problems:
        raise DeltaflError(*problems)
    return rule(**own)


NO_TRANSFORMS: tuple[Transform, ...] = ()


def all_in_range(rule: str, name: str, value: PerModel, low: float, high: float) -> None:
    """`in_range` of every number; raise DeltaflError too unless the last of the patterns is "*"."""
    if isinstance(value, Mapping) and list(value)[-1:] != ["*"]:
        raise DeltaflError(
            f'{rule}: {name} by tensor needs "*" as its last pattern, for all the others'
        )
    for row in value.values() if isinstance(value, Mapping) else [[value]]:
        for one in row:
            in_range(rule, name, one, low, high)


def in_range(
    rule: str, name: str, value: float, low: float, high: float, *, open_high: bool = False
) -> None:
    """Raise DeltaflError unless low <= value <= high (or < high)."""
    if not (low <= value and (value < high if open_high else value <= high)):
        raise DeltaflError(
            f"{rule}: {name} is {value:g}; it must be in [{low:g}, {high:g}{')' if open_high else ']'}"
        )
