"""What an aggregation rule is: the types that every file of this room is written against.

Nothing here imports torch, so that the command line knows every rule and its parameters before the
heavy imports begin; rules speak to tensors through the tensors' own methods.
"""

import dataclasses
import itertools
import math
import typing
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, NamedTuple

from deltafl.errors import DeltaflError
from deltafl.registry import Registry
from deltafl.rules.weights import PerModel, numbers_missing

if TYPE_CHECKING:
    from torch import Tensor
else:
    Tensor = object

RUNNING = ("running_mean", "running_var")
"""Last parts of the names of what a batch norm averages while it is trained. These are no
directions to go on in: every rule takes their mean, and no step goes beyond it.
"""


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

    fixed_point: identical deltas come back as they are. odd: R(-d) = -R(d). coordinate_symmetric:
    permuting coordinates commutes. order_free: the order of models matters only by rounding.
    native_scale: whether the paper states the rule as a sum or as a mean of deltas; the code
    returns a mean either way.
    """

    fixed_point: bool = True
    odd: bool = True
    coordinate_symmetric: bool = True
    order_free: bool = True
    native_scale: Literal["sum", "mean"] = "mean"


@dataclass(frozen=True)
class Stats:
    """What a linear rule sees: the sources, and if it declares `needs_gram` the Gram matrix.

    gram: <delta_i, delta_j>, (n, n) float64; (0, 0) for other rules.
    """

    sources: tuple[Source, ...]
    gram: Tensor


class Within(NamedTuple):
    """The range of a parameter, both ends included: `Annotated[float, Within(0, 1)]`."""

    low: float
    high: float = float("inf")


def _refuse(what: str, hint: object, value: PerModel) -> None:
    """Raise DeltaflError unless the value, or each of its numbers by model, fits the type."""
    kinds, choices = typing.get_args(hint), typing.get_origin(hint) is Literal
    if choices and value not in kinds:
        known = f"{', '.join(kinds[:-1])} or {kinds[-1]}"
        raise DeltaflError(f'{what} is "{value}"; it must be {known}')
    numbers = itertools.chain(*value.values()) if isinstance(value, Mapping) else [value]
    ranges = [kind for kind in kinds if isinstance(kind, Within)]
    for one, (low, high) in itertools.product(numbers, ranges):
        if isinstance(one, int | float) and not low <= one <= high:
            limits = f"in [{low:g}, {high:g}]" if high < math.inf else f"{low:g} or more"
            raise DeltaflError(f"{what} is {one:g}; it must be {limits}")


class Threshold(NamedTuple):
    """Of magnitudes, as float32: smaller ones are dropped, and equal ones from flat element `stop`
    of their tensor on.
    """

    value: float = 0.0
    stop: int = 0


class Transform(ABC):
    """A change of each delta, block by block, before anything is reduced or combined.

    density: the fraction kept, exactly, whose threshold the engine finds; None: no threshold is
    needed. per_tensor: one threshold for each tensor, not for the whole delta; only
    then may the density differ by tensor. whole: blocks are whole tensors, in their shape.
    """

    density: PerModel | None = None
    per_tensor: bool = False
    whole: bool = False

    @abstractmethod
    def apply(
        self, block: Tensor, model: int, name: str, start: int, threshold: Threshold
    ) -> Tensor:
        """The changed block, (m,), of the same dtype; the argument may be overwritten.

        Of a whole tensor (*shape) -> (*shape).
        """


@dataclass(frozen=True)
class Rule:
    """n deltas -> one update, at mean scale. A frozen dataclass, whose fields are its parameters.

    A rule is of one kind: a `LinearRule`, a `CoordinateRule` or a `TensorRule`; the latter two do
    not see models of weight 0. What it does not say has a default. num_models: how many it merges,
    where it is not any number. needs_gram: it wants the Gram matrix. weighs_examples: it weighs the
    deltas by their numbers of examples itself. values: parameters to compare where none are named,
    a value or a list. needs: what it works with. searched: what a search tries beside those that it
    is given.

    Raises:
        DeltaflError: a parameter is not one of its type's `Literal`, or outside its `Within`.
    """

    traits: ClassVar[Traits] = Traits()
    transforms: ClassVar[tuple[Transform, ...]] = ()
    num_models: ClassVar[int | None] = None
    needs_gram: ClassVar[bool] = False
    weighs_examples: ClassVar[bool] = False
    needs: ClassVar[str] = "the models alone; lambda is chosen on validation data"
    values: ClassVar[Mapping[str, object]] = {}
    searched: ClassVar[Mapping[str, object]] = {}

    def __post_init__(self) -> None:
        for key, hint in typing.get_type_hints(type(self), include_extras=True).items():
            if key in vars(self):
                _refuse(f"{self.name}: {key}", hint, vars(self)[key])

    @property
    def name(self) -> str:
        """What it is registered as."""
        named = (name for name in RULES if RULES[name] is type(self))
        return next(named, type(self).__name__)

    @property
    def core(self) -> "Rule":
        """The rule that combines: the innermost of a wrapper such as `Dare(inner=Ties())`."""
        return self

    def problems(self, sources: Sequence[Source]) -> list[str]:
        """Why it cannot work with these sources, as far as they alone tell, one line each."""
        n, wanted = len(sources), self.num_models
        wrong = f"{self.name}: {n} models; it merges {wanted} into the base, no more and no less"
        missing = (numbers_missing(f"{self.name}: {k}", v, n) for k, v in vars(self).items())
        return [wrong] * (wanted not in (None, n)) + [*itertools.chain(*missing)]

    def at(self, name: str) -> "Rule":
        """The rule for one tensor: its parameters by tensor are those of this one."""
        return self

    @classmethod
    def grid(cls, given: Mapping[str, object], norms: Sequence[float]) -> Mapping[str, object]:
        """Parameters that a search tries beside the given ones; norms: of the deltas, (n,)."""
        return cls.searched

    @classmethod
    def typical(cls) -> dict[str, object]:
        """One value of each of `values`, that in the middle."""
        return {
            k: v[(len(v) - 1) // 2] if isinstance(v, list) else v for k, v in cls.values.items()
        }

    @classmethod
    def seeded(cls, params: Mapping[str, object], seed: int) -> dict[str, object]:
        """The parameters, with the seed of a run for a rule that has one and is given none."""
        own = {"seed": seed} if "seed" in parameters(cls) else {}
        return own | dict(params)


class LinearRule(Rule, ABC):
    """R = sum_i c_i delta_i."""

    @abstractmethod
    def coefficients(self, stats: Stats, weights: Tensor) -> Tensor:
        """c, (n,) float64, from weights p, (n,) float64, that are >= 0 and sum to 1."""


class CoordinateRule(Rule, ABC):
    """R is computed for each coordinate on its own."""

    @abstractmethod
    def combine(self, block: Tensor, weights: Sequence[float]) -> Tensor:
        """(n, m), p > 0 with sum 1 -> (m,), same dtype; the block may be overwritten."""


class TensorRule(Rule, ABC):
    """R is computed for each tensor on its own, which must fit into memory n times.

    Rules of matrices (by SVD) and of whole directions (slerp) are of this kind; they tell matrices
    from vectors by the number of dimensions.

    space: what is combined: "deltas", or "weights": theta_0, theta_1 .. theta_n to theta, from
    which theta_0 is subtracted again. These are in float64, and weights must not be negative.
    """

    space: Literal["deltas", "weights"] = "deltas"

    @abstractmethod
    def combine(self, tensors: Tensor, weights: Sequence[float]) -> Tensor:
        """(n, *shape), p > 0 with sum 1 -> (*shape), same dtype; may overwrite its argument.

        Of weights (1 + n, *shape), the base first.
        """


@dataclass(frozen=True)
class ExampleRule(Rule):
    """R is found with examples of the tasks, by models that run: for merges of checkpoints only.

    examples: of the train split of each task, without their labels, drawn by the seed; of
    `Learned` of the validation split, with them.
    """

    examples: Annotated[int, Within(1)] = 128
    seed: int = 0

    needs: ClassVar[str] = "unlabelled examples"


@dataclass(frozen=True)
class LayerRule(ExampleRule):
    """R is solved for, linear map by linear map, from what the maps are given on the examples.

    A map multiplies rows x by its weight: tokens, or the patches of a convolution; a bias is one
    more column, for an x with a 1 at its end. On the examples of task t let L_t and R_t be the rows
    at the map in the models that `inputs` names, the fine-tune ("tuned") or the merged model as far
    as it is merged, and W_t the fine-tune's map. A map whose result is added to something that a
    pass computed before it (a skip connection) makes good what that lacks: E_t is the same in the
    model of L less that of R, else 0. The merged map is, with weights p,

        W = (sum_t p_t (W_t L_t^T + E_t^T) R_t + lambda P) (sum_t p_t R_t^T R_t + lambda I)^-1

    where the products are means over rows, P = sum_t p_t W_t and lambda = ridge * mean diagonal.
    What is no map is moved by the mean of the deltas. Scale 1; nothing is searched.

    ridge: None: 0.01 for up to 32 examples, else 0.0001.
    """

    ridge: Annotated[float | None, Within(0)] = None

    inputs: ClassVar[tuple[Literal["tuned", "merged"], Literal["tuned", "merged"]]]


def refuse_examples(rule: Rule) -> None:
    """Raise DeltaflError for a rule that needs more than deltas."""
    if isinstance(rule.core, ExampleRule):
        raise DeltaflError(
            f"{rule.core.name} needs {rule.core.needs} of the tasks: it merges checkpoints, by "
            "`deltafl merge --tasks ..` or `deltafl search`"
        )


def check_rule(rule: Rule, sources: Sequence[Source]) -> None:
    """Raise DeltaflError if the rule cannot work with these sources."""
    problems = rule.problems(sources) if sources else ["no models to merge"]
    if problems:
        raise DeltaflError(*problems)


RULES: Registry[type[Rule]] = Registry("method")


def parameters(rule: type[Rule]) -> dict[str, tuple[object, object]]:
    """Parameter name -> (type, default or dataclasses.MISSING); a rule in it goes by its name."""
    hints = typing.get_type_hints(rule)
    return {
        f.name: (str, f.default.name) if isinstance(f.default, Rule) else (hints[f.name], f.default)
        for f in dataclasses.fields(rule)
    }
