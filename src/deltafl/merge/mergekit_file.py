"""The keys of a mergekit configuration, as mergekit 0.1.5 knows them."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Annotated, TypeAlias

import numpy as np
from pydantic import BeforeValidator, Field

from deltafl.errors import brief
from deltafl.merge.recipe import Dtype
from deltafl.recipes import Recipe, one_of, problem


@dataclass(frozen=True)
class Kind:
    """What a method makes a difference by, and how many models it takes beside its base.

    whole: it merges the models as they are; a base among them is one of them.
    """

    uses: frozenset[str]
    whole: bool = False
    count: int | None = None


def _kind(uses: str, whole: bool = False, count: int | None = None) -> Kind:
    return Kind(frozenset(uses.split()), whole, count)


METHODS: Mapping[str, Kind] = {
    "linear": _kind("weight normalize", whole=True),
    "slerp": _kind("t", count=1),
    "nuslerp": _kind("weight nuslerp_flatten nuslerp_row_wise", whole=True, count=2),
    "multislerp": _kind("weight normalize_weights", whole=True),
    "karcher": _kind("max_iter tol", whole=True),
    "task_arithmetic": _kind("weight normalize lambda_"),
    "ties": _kind("weight normalize lambda_ density rescale"),
    "dare_linear": _kind("weight normalize lambda_ density rescale"),
    "dare_ties": _kind("weight normalize lambda_ density rescale"),
    "della": _kind("weight normalize lambda_ density rescale epsilon"),
    "della_linear": _kind("weight normalize lambda_ density rescale epsilon"),
    "breadcrumbs": _kind("weight normalize lambda_ density rescale gamma"),
    "breadcrumbs_ties": _kind("weight normalize lambda_ density rescale gamma"),
    "model_stock": _kind("filter_wise"),
    "sce": _kind("select_topk"),
    "nearswap": _kind("t", count=1),
    "arcee_fusion": _kind("", count=1),
    "passthrough": _kind("scale", whole=True, count=0),
    "ram": _kind("epsilon"),
}


def _by_filter(value: object) -> dict[str, object]:
    """The forms of a setting as one."""
    parts = value if isinstance(value, tuple | list) else ()
    by_filter = any(isinstance(part, dict) for part in parts)
    found: dict[str, object] = {}
    for part in parts if by_filter else ({"value": value},):
        if not isinstance(part, dict) or part.keys() - {"filter"} != {"value"}:
            forms = "a number, a list of such over the layers, or a list of {filter, value}"
            raise problem(f"must be {forms}, not {brief(value)}")
        key, values = str(part.get("filter") or "").replace("*", ""), part["value"]
        listed = values if isinstance(values, list | tuple) else (values,)
        found.setdefault(key, tuple(float(v) if isinstance(v, bool) else v for v in listed))
    return found


Values: TypeAlias = Annotated[tuple[float, ...], Field(min_length=1)]
Setting: TypeAlias = Annotated[dict[str, Values], BeforeValidator(_by_filter)]
"""Part of a tensor's name -> values over the layers: the first part that is in the name counts.
Switches are 1 and 0.
"""


def model_named(value: object) -> str | None:
    """The forms of a model's name as one; None: it is none."""
    if not isinstance(value, dict):
        return value if isinstance(value, str) else None
    whole, revision = model_named(value.get("model", value.get("path"))), value.get("revision")
    adapter = model_named(value.get("lora"))
    odd = [key for key in value.keys() - {"model", "path", "lora", "revision"} if value[key]]
    if whole is None or odd or (value.get("lora") and not adapter):
        return None
    return whole + (f"@{revision}" if revision else "") + (f"+{adapter}" if adapter else "")


def _reference(value: object) -> str:
    if (found := model_named(value)) is None:
        raise problem(f"must name a model, not {brief(value)}")
    return found


Reference: TypeAlias = Annotated[str, BeforeValidator(_reference)]


class Parameters(Recipe):
    """Of one model, of a slice, or of all."""

    weight: Setting = Field(default={})
    density: Setting = Field(default={})
    gamma: Setting = Field(default={})
    epsilon: Setting = Field(default={})
    scale: Setting = Field(default={})
    lambda_: Setting = Field(default={}, alias="lambda")
    t: Setting = Field(default={})
    select_topk: Setting = Field(default={})
    max_iter: Setting = Field(default={})
    tol: Setting = Field(default={})
    normalize: Setting = Field(default={})
    normalize_weights: Setting = Field(default={})
    rescale: Setting = Field(default={})
    filter_wise: Setting = Field(default={})
    nuslerp_flatten: Setting = Field(default={})
    nuslerp_row_wise: Setting = Field(default={})
    int8_mask: Setting = Field(default={})
    allow_negative_weights: Setting = Field(default={})

    def of(self, key: str) -> Mapping[str, Values]:
        """A parameter by name."""
        return dict(self)[key]


class Input(Recipe):
    """One of `models:`."""

    model: Reference
    parameters: Parameters = Parameters()
    dtype: Dtype | None = None


class SliceSource(Input):
    """One of the `sources:` of a slice."""

    layer_range: tuple[int, int] = (0, 0)

    def part(self, base: str | None = None) -> str:
        """Its layers, or those of another model, as a part of a stack."""
        start, stop = self.layer_range
        return f"{base or self.model}[{start}:{stop}]" if stop else base or self.model


class Slice(Recipe):
    """One of `slices:`."""

    sources: tuple[SliceSource, ...] = Field(min_length=1)
    parameters: Parameters = Parameters()
    base_model: Reference | None = None
    merge_method: str | None = None


class TokenRow(Recipe):
    """Where the row of a token comes from, as `TokenRule`; kind: none, a model, or a mapping."""

    source: Reference | dict[str, object] | None = None
    force: bool = False


class Tokenizer(Recipe):
    """Whose tokens the result has."""

    source: Reference = "union"
    tokens: dict[str, TokenRow] = Field(default={})
    pad_to_multiple_of: int | None = None


class Module(Recipe):
    """One of `modules:`, or what stands for a single one."""

    models: tuple[Input, ...] = ()
    slices: tuple[Slice, ...] = ()
    parameters: Parameters = Parameters()


class Mergekit(Module):
    """The file. `name` names it, for a later document."""

    merge_method: Annotated[str, one_of(lambda: METHODS)]
    base_model: Reference | None = None
    modules: dict[str, Module] = Field(default={})
    dtype: Dtype | None = None
    out_dtype: Dtype | None = None
    tokenizer_source: Reference | None = None
    tokenizer: Tokenizer | None = None
    chat_template: str | None = None
    name: str | None = None

    def problems(self) -> Iterator[str]:
        """Parts that contradict one another."""
        if len(self.modules) > 1:
            yield "modules: must be one; others than language models merge by models or slices"
        if sum(map(bool, (self.models, self.slices, self.modules))) != 1:
            yield "models: give models, or slices"
        if self.tokenizer_source and self.tokenizer:
            yield "tokenizer: is given as tokenizer_source too; give one of them"
        for i, part in enumerate(self.slices):
            if part.merge_method not in (None, self.merge_method):
                yield f"slices.{i}.merge_method: must be {self.merge_method}, that of the file"

    @property
    def kind(self) -> Kind:
        """Of the method."""
        return METHODS[self.merge_method]

    @property
    def whole(self) -> bool:
        """Whether whole models are merged, not differences from the base."""
        spherical = self.merge_method in ("nuslerp", "multislerp")
        return self.kind.whole and not (spherical and self.base_model)

    @property
    def parts(self) -> tuple[Slice, ...]:
        """Slices; of models without one, the one that all their layers are."""
        if found := next(iter(self.modules.values()), None):
            return self.model_copy(update={"modules": {}, **dict(found)}).parts
        shared = [SliceSource(**dict(one)) for one in self.models]
        return self.slices or (Slice(sources=tuple(shared)),)

    def value(
        self, key: str, name: str, t: float, part: Slice, source: Input | None = None
    ) -> float | None:
        """What a parameter is for a tensor: in the model's own, then in the slice's, then in those
        of all. A list of values is interpolated at t.
        """
        places = [*([source] if source else []), part, *self.modules.values(), self]
        for there, values in chain.from_iterable(p.parameters.of(key).items() for p in places):
            if there in name:
                return float(np.interp(t, np.linspace(0, 1, len(values)), values))
        return None

    def given(self) -> set[str]:
        """The parameters that are given anywhere."""
        places = (
            self,
            *self.modules.values(),
            *self.parts,
            *chain(*(p.sources for p in self.parts)),
        )
        return {key for place in places for key in place.parameters.model_fields_set}
