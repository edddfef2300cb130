"""The keys of a mergekit configuration that are understood; every other is a mistake, one line
each.
"""

import math
from collections.abc import Callable, Iterator
from typing import Annotated, Any, Literal, NamedTuple, TypeAlias

from pydantic import BeforeValidator, Field

from deltafl.recipes import Recipe, one_of, problem

Setting: TypeAlias = tuple[tuple[str, tuple[float, ...]], ...]
"""(part of a tensor's name, values over the layers): the first part that is in the name counts; ():
not given.
"""


class Method(NamedTuple):
    """What a merge_method does. sparsify: by magnitude ("trim") or at random ("drop"); elect:
    signs, as TIES does.
    """

    sparsify: Literal["", "trim", "drop"]
    elect: bool
    normalize: bool


METHODS = {
    "linear": Method("", elect=False, normalize=True),
    "task_arithmetic": Method("", elect=False, normalize=False),
    "ties": Method("trim", elect=True, normalize=True),
    "dare_linear": Method("drop", elect=False, normalize=False),
    "dare_ties": Method("drop", elect=True, normalize=False),
}


def _setting(good: Callable[[Any], bool], wanted: str) -> BeforeValidator:
    """A scalar, a list of values over the layers, or these by `filter`, in the one form of
    `Setting`.
    """

    def read(value: Any) -> Setting:
        by_filter = isinstance(value, tuple) and value and isinstance(value[0], dict)
        found = []
        for part in value if by_filter else (value,):
            part = part if isinstance(part, dict) else {"value": part}
            held = part.get("value")
            values = tuple(held) if isinstance(held, list | tuple) else (held,)
            if part.keys() - {"filter", "value"} or not values or not all(map(good, values)):
                forms = f"{wanted}, a list of such over the layers, or a list of {{filter, value}}"
                raise problem(f"must be {forms}, not {value!r}")
            found.append((str(part.get("filter") or "*").replace("*", ""), values))
        return tuple(found)

    return BeforeValidator(read)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _reference(value: Any) -> str:
    if isinstance(value, dict) and not any(
        value[key] for key in value.keys() - {"model", "path", "revision"}
    ):
        whole = _reference(value.get("model", value.get("path")))
        return f"{whole}@{value['revision']}" if value.get("revision") else whole
    if not isinstance(value, str) or "+" in value:
        raise problem(f"must name a whole model, not {value!r}; merge a LoRA into its model first")
    return value


def _base(value: Any) -> Any:
    if value not in (None, "base", {"source": "base"}):
        raise problem(f"must be base, whose tokenizer is copied, not {value!r}")
    return value


Numbers: TypeAlias = Annotated[Any, _setting(_is_number, "a number")]
Switch: TypeAlias = Annotated[Any, _setting(lambda value: isinstance(value, bool), "true or false")]
Reference: TypeAlias = Annotated[str, BeforeValidator(_reference)]
BaseOnly: TypeAlias = Annotated[Any, BeforeValidator(_base)]
Dtype: TypeAlias = Literal["float32", "float16", "bfloat16", "float64"]


class OfModel(Recipe):
    """Parameters of one model."""

    weight: Numbers = ()
    density: Numbers = ()


class OfAll(OfModel):
    """Parameters of all models, or of a slice."""

    lambda_: Numbers = Field(default=(), alias="lambda")
    normalize: Switch = ()
    rescale: Switch = ()
    int8_mask: Switch = ()


class Input(Recipe):
    """One of `models:`."""

    model: Reference
    parameters: OfModel = OfModel()


class Source(Input):
    """One of the `sources:` of a slice."""

    layer_range: tuple[int, int]


class Slice(Recipe):
    """One of `slices:`."""

    sources: tuple[Source, ...] = Field(min_length=1)
    parameters: OfAll = OfAll()


class Mergekit(Recipe):
    """The file. `name` names it and nothing else."""

    merge_method: Annotated[str, one_of(lambda: METHODS)]
    base_model: Reference | None = None
    models: tuple[Input, ...] = ()
    slices: tuple[Slice, ...] = ()
    parameters: OfAll = OfAll()
    dtype: Dtype | None = None
    out_dtype: Dtype | None = None
    tokenizer_source: BaseOnly = None
    tokenizer: BaseOnly = None
    name: str | None = None

    def scopes(self) -> Iterator[tuple[str, str | None, dict[str, Setting]]]:
        """(path, model or None, the parameters given there) of every place that may have some."""
        places: list[tuple[str, str | None, OfModel]] = [
            (f"models.{i}", x.model, x.parameters) for i, x in enumerate(self.models)
        ]
        for i, part in enumerate(self.slices):
            for j, x in enumerate(part.sources):
                places.append((f"slices.{i}.sources.{j}", x.model, x.parameters))
            places.append((f"slices.{i}", None, part.parameters))
        for path, model, parameters in (*places, ("", None, self.parameters)):
            given = {key.rstrip("_"): setting for key, setting in parameters if setting}
            yield f"{path}.parameters".lstrip("."), model, given
