"""A mergekit configuration as a merge recipe: the same numbers in our terms, or one line for every
key that has none.

The meaning of the keys is that of mergekit 0.1.5. A parameter of a model is looked up in its own
parameters, then in those of the slice, then in those of all. A list of values is interpolated at t,
which runs from 0 to 1 over the layers of a slice (1 if it has one layer) and is 0 outside the
layers.
"""

import glob
import math
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import Annotated, Literal, TypeAlias

import numpy as np
from pydantic import BeforeValidator, Field

from deltafl.errors import DeltaflError, brief
from deltafl.merge.plan import LAYER, Facts, read_model
from deltafl.merge.recipe import Dtype
from deltafl.recipes import Recipe, one_of, problem, read_recipe

METHODS = ("linear", "task_arithmetic", "ties", "dare_linear", "dare_ties")


def _by_filter(value: object) -> dict[str, object]:
    """The forms of a setting as one."""
    parts = value if isinstance(value, tuple) else ()
    by_filter = any(isinstance(part, dict) for part in parts)
    found: dict[str, object] = {}
    for part in parts if by_filter else ({"value": value},):
        if not isinstance(part, dict) or part.keys() - {"filter"} != {"value"}:
            forms = "a number, a list of such over the layers, or a list of {filter, value}"
            raise problem(f"must be {forms}, not {brief(value)}")
        key, values = str(part.get("filter") or "").replace("*", ""), part["value"]
        found.setdefault(key, tuple(values) if isinstance(values, list | tuple) else (values,))
    return found


Values: TypeAlias = Annotated[tuple[float, ...], Field(min_length=1)]
Setting: TypeAlias = Annotated[dict[str, Values], BeforeValidator(_by_filter)]
"""Part of a tensor's name -> values over the layers: the first part that is in the name counts."""


def _reference(value: object) -> str:
    if isinstance(value, dict) and not any(
        value[key] for key in value.keys() - {"model", "path", "revision"}
    ):
        whole = _reference(value.get("model", value.get("path")))
        return f"{whole}@{value['revision']}" if value.get("revision") else whole
    if not isinstance(value, str) or "+" in value:
        raise problem(
            f"must name a whole model, not {brief(value)}; merge a LoRA into its model first"
        )
    return value


Reference: TypeAlias = Annotated[str, BeforeValidator(_reference)]


class OfModel(Recipe):
    """Parameters of one model."""

    weight: Setting = Field(default={})
    density: Setting = Field(default={})


class OfSlice(OfModel):
    """Parameters of all models, in a slice."""

    lambda_: Setting = Field(default={}, alias="lambda")


class OfAll(OfSlice):
    """Parameters of all models."""

    normalize: bool | None = None
    rescale: bool | None = None
    int8_mask: bool | None = None


class Input(Recipe):
    """One of `models:`."""

    model: Reference
    parameters: OfModel = OfModel()


class SliceSource(Input):
    """One of the `sources:` of a slice."""

    layer_range: tuple[int, int]


class Slice(Recipe):
    """One of `slices:`."""

    sources: tuple[SliceSource, ...] = Field(min_length=1)
    parameters: OfSlice = OfSlice()


class Tokenizer(Recipe):
    """The base's, whose files are copied."""

    source: Literal["base"] = "base"


class Mergekit(Recipe):
    """The file. `name` names it and nothing else."""

    merge_method: Annotated[str, one_of(lambda: METHODS)]
    base_model: Reference | None = None
    models: tuple[Input, ...] = ()
    slices: tuple[Slice, ...] = ()
    parameters: OfAll = OfAll()
    dtype: Dtype | None = None
    out_dtype: Dtype | None = None
    tokenizer_source: Literal["base"] | None = None
    tokenizer: Tokenizer | None = None
    name: str | None = None

    @property
    def linear(self) -> bool:
        """Whether whole models are averaged, not differences from the base."""
        return self.merge_method == "linear"

    @property
    def drops(self) -> bool:
        """Whether coordinates are dropped at random."""
        return self.merge_method.startswith("dare_")

    @property
    def elects(self) -> bool:
        """Whether a sign is elected, as by TIES, which itself trims by magnitude."""
        return self.merge_method.endswith("ties")

    @property
    def normalize(self) -> bool:
        """As it says, or as its method does by default."""
        told, default = self.parameters.normalize, self.merge_method in ("linear", "ties")
        return default if told is None else told


Row: TypeAlias = Mapping[str, object]
"""What holds for one tensor: a weight and what to sparsify by for each model beside the base, and
the scale.
"""


def translate(data: Mapping[str, object]) -> tuple[Facts, list[str]]:
    """The keys of a `MergeRecipe`, and notes on what has no effect. Reads the base's headers.

    Raises DeltaflError with one line for each key that is wrong or not supported.
    """
    config = read_recipe(Mergekit, data)
    if bool(config.models) == bool(config.slices):
        raise DeltaflError("models: give models, or slices")
    all_layers = [
        SliceSource(model=x.model, parameters=x.parameters, layer_range=(0, sys.maxsize))
        for x in config.models
    ]
    slices = config.slices or (Slice(sources=tuple(all_layers)),)
    models = [source.model for source in slices[0].sources]
    base = config.base_model or (models[0] if config.linear else "")
    if problems := list(_conflicts(config, base, models)):
        raise DeltaflError(*problems)
    names = [name for name, entry in read_model(base).entries.items() if entry.floating]
    rows = {
        name: _row(config, base, name, part, t, problems)
        for name, (part, t) in _places(names, slices, base).items()
    }
    if problems:
        raise DeltaflError(*dict.fromkeys(problems))
    others = [model for model in models if model != base]
    if all(row["weights"] == [0] * len(others) for row in rows.values()):
        raise DeltaflError("weight: all are 0; give a model beside the base another one")
    return {"base": base, "models": others, **_recipe(config, rows)}, list(_notes(config, base))


def _conflicts(config: Mergekit, base: str, models: Sequence[str]) -> Iterator[str]:
    """What the method, or a merge as ours, cannot do, known before any tensor's name is."""
    name = config.merge_method
    if not base:
        yield f"base_model: is missing; {name} merges differences from it"
    elif config.linear and base not in models:
        yield "base_model: linear merges the models alone; list it among them with its weight"
    if not {*models} - {base}:
        yield "models: there is none beside the base"
    if len({*models}) < len(models):
        yield "models: one is given twice"
    end = 0
    for i, part in enumerate(config.slices):
        start, stop = part.sources[0].layer_range
        held = {(source.model, source.layer_range) for source in part.sources}
        if held != {(model, (end, stop)) for model in models} or stop <= start:
            yield f"slices.{i}: must hold the same layers of all models, from layer {end} on"
        end = stop
    wanted = str(config.drops).lower()
    if (config.drops or config.elects) and config.parameters.rescale not in (None, config.drops):
        yield f"parameters.rescale: must be {wanted} with {name}, as it is by default"


FIRST = re.compile("embed|wte|wpe")
"""In the names of what comes before the layers, and so belongs to the first slice."""


def _places(
    names: Sequence[str], slices: Sequence[Slice], base: str
) -> dict[str, tuple[Slice, float]]:
    """Tensor -> its slice, and t. Raises DeltaflError if slices do not end with the layers."""
    found = {name: match.groups() for name in names if (match := LAYER.match(name))}
    depths: dict[str, int] = {}
    for stack, layer in found.values():
        depths[stack] = max(depths.get(stack, 0), int(layer) + 1)
    end = slices[-1].sources[0].layer_range[1]
    if end < sys.maxsize and {*depths.values()} != {end}:
        raise DeltaflError(f'slices: they end at layer {end}, and the layers of "{base}" do not')
    places = {name: (slices[0 if FIRST.search(name) else -1], 0.0) for name in names}
    for name, (stack, layer) in found.items():
        part = next(part for part in slices if int(layer) < part.sources[0].layer_range[1])
        start, stop = part.sources[0].layer_range
        last = min(stop, depths[stack]) - 1 - start
        places[name] = part, (int(layer) - start) / last if last else 1.0
    return places


def _row(config: Mergekit, base: str, name: str, part: Slice, t: float, problems: list[str]) -> Row:
    """What holds for one tensor, the weights divided by their sum where that is what normalise
    means.
    """

    def value(default: float, *settings: Mapping[str, Values]) -> float:
        for key, values in chain.from_iterable(setting.items() for setting in settings):
            if key in name:
                return float(np.interp(t, np.linspace(0, 1, len(values)), values))
        return default

    common, shared = config.parameters, part.parameters
    others = [source for source in part.sources if source.model != base]
    weights = {
        source.model: value(math.nan, source.parameters.weight, shared.weight, common.weight)
        for source in (part.sources if config.linear else others)
    }
    densities = [
        value(1.0, source.parameters.density, shared.density, common.density) for source in others
    ]
    scale = 1.0 if config.linear else value(1.0, shared.lambda_, common.lambda_)
    missing = [model for model, weight in weights.items() if math.isnan(weight)]
    problems += [f'weight: is missing for model "{model}"' for model in missing]
    total = sum(weights.values())
    if config.elects and config.normalize and min(weights.values()) < 0:
        problems.append(f"weight: must not be negative with {config.merge_method} and normalize")
    if config.linear and config.normalize and total == 0:
        problems.append("weight: the weights of linear sum to 0; give others, or normalize: false")
    if config.linear and not config.normalize and abs(total - 1) > 1e-6:
        problems.append(
            f"parameters.normalize: false needs weights of sum 1 with linear, not {total:g}"
        )
    divided = config.normalize and not config.elects and abs(total) >= 1e-8
    kept = [weights[source.model] / (total if divided else 1) for source in others]
    if config.drops:
        densities = [1 - density for density in densities]
    return {"weights": kept, "sparsify": densities, "scale": scale}


def _recipe(config: Mergekit, rows: Mapping[str, Row]) -> Facts:
    """The method with its parameters, weights and scale."""
    default = rows[min(rows, key=lambda name: LAYER.match(name) is not None)]

    def by_name(key: str) -> dict[str, object]:
        found = {glob.escape(name): row[key] for name, row in rows.items()}
        return {name: value for name, value in found.items() if value != default[key]}

    rule: dict[str, object] = {"method": "task_arithmetic"}
    sparsify = {**by_name("sparsify"), "*": default["sparsify"]}
    mean = config.elects and config.normalize
    election = {"merge": "mean" if mean else "sum", "zero_sum": "positive"}
    if config.drops:
        inner = {"inner": "ties", "density": 1.0, **election} if config.elects else {}
        rule = {"method": "dare", "drop_rate": sparsify, **inner}
    elif config.elects:
        rule = {"method": "ties", "density": sparsify, "per_tensor": True, **election}
    return rule | {
        "weights": default["weights"],
        "weight_patterns": by_name("weights"),
        "server_lr" if mean else "scaling_coef": default["scale"],
        "scale_patterns": by_name("scale"),
        "dtype": config.out_dtype or config.dtype,
    }


def _notes(config: Mergekit, base: str) -> Iterator[str]:
    """What the file says and makes no difference, and what is done otherwise than in mergekit."""
    name = config.merge_method
    sources = [*config.models, *(source for part in config.slices for source in part.sources)]
    used = {"weight", "normalize"}
    if config.drops or config.elects:
        used |= {"density", "rescale"}
    if not config.linear:
        used.add("lambda_")
        if any(x.model == base and x.parameters.model_fields_set for x in sources):
            yield "parameters: make no difference for the base"
    places = (config, *config.slices, *sources)
    given = {key for place in places for key in place.parameters.model_fields_set}
    for key in sorted(given - used):
        yield f"{key.rstrip('_')}: makes no difference with {name}"
    if config.drops:
        yield (
            f"{name}: other random numbers than mergekit's, and what is kept is divided by the "
            "density"
        )
    if config.dtype in ("float16", "bfloat16"):
        yield (
            "dtype: computed in float32 and rounded once, where mergekit computes in "
            f"{config.dtype}"
        )
