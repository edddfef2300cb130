"""The keys of a mergekit configuration that are understood; every other is a mistake, one line each."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BeforeValidator, Field

from deltafl.recipes import Recipe, problem

Setting: TypeAlias = tuple[tuple[str, tuple[float, ...]], ...]
"""(part of a tensor's name, values over the layers): the first part that is in the name counts; (): not given."""


@dataclass(frozen=True)
class Method:
    """What a merge_method does. sparsify: by magnitude ("trim") or at random ("drop"); elect: signs, as TIES does."""

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
    """A scalar, a list of values over the layers, or these by `filter`, in the one form of `Setting`."""

    def read(value: Any) -> Setting:
        by_filter = isinstance(value, tuple) and value and isinstance(value[0], dict)
        found = []
        for part in value if by_filter else [value]:
            part = part if isinstance(part, dict) else {"value": part}
            held = part.get("value")
            values = tuple(held) if isinstance(held, list | tuple) else (held,)
            if part.keys() - {"filter", "value"} or not values or not all(map(good, values)):
                forms = f"{wanted}, a list of such over the layers, or a list of {{filter, value}}"
                raise problem(f"must be {forms}, not {value!r}")
            found.append(("" if part.get("filter") in (None, "*") else str(part["filter"]), values))
        return tuple(found)

    return BeforeValidator(read)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _reference(value: Any) -> str:
    if isinstance(value, dict):
        if any(value[key] for key in value.keys() - {"model", "path", "revision"}):
            raise problem(
                "must be a whole model of its own architecture; merge a LoRA into its model first"
            )
        whole = _reference(value.get("model", value.get("path")))
        return f"{whole}@{value['revision']}" if value.get("revision") else whole
    if not isinstance(value, str):
        raise problem(f"must name a model, not {value!r}")
    if "+" in value:
        raise problem(f"must be a whole model, not {value!r}; merge the LoRA into it first")
    return value


def _only(wanted: str, *accepted: Any) -> BeforeValidator:
    """None, or one of `accepted`."""

    def read(value: Any) -> Any:
        if value is not None and value not in accepted:
            raise problem(f"{wanted}, not {value!r}")
        return value

    return BeforeValidator(read)


def _method(value: Any) -> Any:
    if value not in METHODS:
        raise problem(f"{value!r} is not supported; it must be one of {', '.join(METHODS)}")
    return value


Numbers: TypeAlias = Annotated[Any, _setting(_is_number, "a number")]
Switch: TypeAlias = Annotated[Any, _setting(lambda value: isinstance(value, bool), "true or false")]
Reference: TypeAlias = Annotated[str, BeforeValidator(_reference)]
Unsupported: TypeAlias = Annotated[Any, _only("is not supported; it must be left out")]
BaseOnly: TypeAlias = Annotated[
    Any, _only("must be base, whose tokenizer is copied", "base", {"source": "base"})
]
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
    parameters: OfModel | None = None


class Source(Input):
    """One of the `sources:` of a slice."""

    layer_range: tuple[int, int]


class Slice(Recipe):
    """One of `slices:`."""

    sources: tuple[Source, ...] = Field(min_length=1)
    parameters: OfAll | None = None
    base_model: Unsupported = None
    residual_weight: Unsupported = None


class Mergekit(Recipe):
    """The file. `name` names it and nothing else."""

    merge_method: Annotated[str, BeforeValidator(_method)]
    base_model: Reference | None = None
    models: tuple[Input, ...] | None = Field(None, min_length=1)
    slices: tuple[Slice, ...] | None = Field(None, min_length=1)
    modules: Unsupported = None
    parameters: OfAll | None = None
    dtype: Dtype | None = None
    out_dtype: Dtype | None = None
    tokenizer_source: BaseOnly = None
    tokenizer: BaseOnly = None
    chat_template: Unsupported = None
    name: str | None = None


def scopes_of(config: Mergekit) -> Iterator[tuple[str, str | None, list[tuple[str, Setting]]]]:
    """(path, model or None, the parameters given there) of every place that has some."""

    def given(parameters: OfModel | None) -> list[tuple[str, Setting]]:
        return [(key.rstrip("_"), setting) for key, setting in parameters or () if setting]

    for i, item in enumerate(config.models or ()):
        yield f"models.{i}.parameters", item.model, given(item.parameters)
    for i, part in enumerate(config.slices or ()):
        for j, item in enumerate(part.sources):
            yield f"slices.{i}.sources.{j}.parameters", item.model, given(item.parameters)
        yield f"slices.{i}.parameters", None, given(part.parameters)
    yield "parameters", None, given(config.parameters)
