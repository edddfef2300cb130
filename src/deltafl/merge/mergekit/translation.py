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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from deltafl.checkpoints.layout import read_layout
from deltafl.errors import DeltaflError
from deltafl.merge.mergekit.format import METHODS, Mergekit, OfModel
from deltafl.merge.plan import entries_in
from deltafl.recipes import read_recipe

Layers: TypeAlias = Mapping[str, tuple[int, int]]
"""Tensor -> (its layer, the number of layers)."""

LAYER = re.compile(r"(|.*?\.)(\d+)\.")
BEFORE_LAYERS = ("embed", "wte", "wpe")
"""Parts of names of what comes before the layers, and so belongs to the first slice."""


@dataclass(frozen=True)
class Span:
    """Layers [start, stop); for each model, and for "" (all), the parameters in the order they are
    looked up in.
    """

    start: int
    stop: float
    scopes: Mapping[str, Sequence[OfModel]]

    @property
    def models(self) -> list[str]:
        """The models, in order."""
        return [model for model in self.scopes if model]

    def value(self, key: str, model: str, name: str, t: float, default: Any) -> Any:
        """A parameter of one tensor at t."""
        for scope in self.scopes[model]:
            for part, values in dict(scope).get(key, ()):
                if part in name:
                    return interpolated(values, t)
        return default


def interpolated(values: Sequence[float], t: float) -> float:
    """The value at t in [0, 1] of evenly spread values; of truth values, the one before."""
    at = t * (len(values) - 1)
    i = int(at)
    if isinstance(values[0], bool):
        return values[i]
    return (1 - (at - i)) * values[i] + (at - i) * values[min(i + 1, len(values) - 1)]


@dataclass(frozen=True)
class Values:
    """What holds for one tensor: a weight and a density for each model beside the base, lambda, and
    normalize.
    """

    weights: list[float]
    densities: list[float]
    scale: float
    normalize: bool


def translate(data: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The keys of a `MergeRecipe`, and notes on what has no effect. Reads the base's headers where
    names matter.

    Raises DeltaflError with one line for each key that is wrong or not supported.
    """
    config = read_recipe(Mergekit, data)
    spans = list(_spans(config))
    if bool(config.models) == bool(config.slices):
        raise DeltaflError("models: give models, or slices")
    models = spans[0].models
    base = config.base_model or (models[0] if config.merge_method == "linear" else "")
    if problems := list(_conflicts(config, base, spans)):
        raise DeltaflError(*problems)
    names, layers = [""], {}
    parts = [part for _, _, given in config.scopes() for value in given.values() for part in value]
    if config.slices or any(part or len(values) > 1 for part, values in parts):
        names = [name for name, entry in entries_in(read_layout(base)).items() if entry.floating]
        layers = layers_of(names)
    if config.slices and {depth for _, depth in layers.values()} != {spans[-1].stop}:
        raise DeltaflError(
            f'slices: they end at layer {spans[-1].stop}, and the layers of "{base}" do not'
        )
    table: dict[str, Values] = {}
    for name in names:
        span, t = place_of(name, spans, layers)
        table[name] = _values(config.merge_method, span, base, name, t, problems)
    if len({values.normalize for values in table.values()}) > 1:
        problems.append("parameters.normalize: must be one value for all tensors")
    if problems:
        raise DeltaflError(*dict.fromkeys(problems))
    others = [model for model in models if model != base]
    return {"base": base, "models": others, **_recipe(config, table)}, _notes(config, base)


def _spans(config: Mergekit) -> Iterator[Span]:
    """The slices, or all layers as one."""
    shared = [config.parameters]
    if config.models:
        models = {x.model: [x.parameters, *shared] for x in config.models}
        yield Span(0, math.inf, models | {"": shared})
    for part in config.slices:
        both = [part.parameters, *shared]
        scopes = {x.model: [x.parameters, *both] for x in part.sources}
        yield Span(*part.sources[0].layer_range, scopes | {"": both})


def _conflicts(config: Mergekit, base: str, spans: Sequence[Span]) -> Iterator[str]:
    """What the method, or a merge as ours, cannot do, known before any tensor's name is."""
    name, method, models = config.merge_method, METHODS[config.merge_method], spans[0].models
    if not base:
        yield f"base_model: is missing; {name} merges differences from it"
    elif name == "linear" and base not in models:
        yield "base_model: linear merges the models alone; list it among them with its weight"
    if not any(model != base for model in models):
        yield "models: there is none beside the base"
    if config.models and len(models) < len(config.models):
        yield "models: one is given twice"
    stops = [0, *(span.stop for span in spans)]
    for i, (part, span) in enumerate(zip(config.slices, spans, strict=False)):
        same = {x.layer_range for x in part.sources} == {(span.start, span.stop)}
        if not (same and {*span.models} == {*models} and span.start == stops[i] < span.stop):
            yield f"slices.{i}: must hold the same layers of all models, from layer {stops[i]} on"
    wanted = method.sparsify == "drop"
    for path, _, given in config.scopes():
        rescale = given.get("rescale", ()) if method.sparsify else ()
        if any(value != wanted for _, values in rescale for value in values):
            yield f"{path}.rescale: must be {str(wanted).lower()} with {name}, as it is by default"


def layers_of(names: Iterable[str]) -> dict[str, tuple[int, int]]:
    """Tensor -> (its layer, the number of layers): the first number in a name, if under its prefix
    they run from 0 on.

    One number alone under a prefix counts as a layer only if no prefix has more.
    """
    found = {name: match for name in names if (match := LAYER.match(name))}
    stacks: dict[str, set[int]] = {}
    for match in found.values():
        stacks.setdefault(match[1], set()).add(int(match[2]))
    depths = {prefix: len(stack) for prefix, stack in stacks.items() if max(stack) < len(stack)}
    least = min(2, max(depths.values(), default=0))
    return {n: (int(m[2]), depths[m[1]]) for n, m in found.items() if depths.get(m[1], 0) >= least}


def place_of(name: str, spans: Sequence[Span], layers: Layers) -> tuple[Span, float]:
    """The slice of a tensor, and t."""
    if name not in layers:
        return spans[0 if any(part in name for part in BEFORE_LAYERS) else -1], 0.0
    layer, depth = layers[name]
    span = next(s for s in spans if s.start <= layer < s.stop)
    last = int(min(span.stop, depth)) - span.start - 1
    return span, (layer - span.start) / last if last else 1.0


def _values(method: str, span: Span, base: str, name: str, t: float, problems: list[str]) -> Values:
    """What holds for one tensor, the weights divided by their sum where that is what normalise
    means.
    """
    kind = METHODS[method]
    models = [m for m in span.models if m != base]
    weights: dict[str, float] = {}
    for model in span.models if method == "linear" else models:
        weights[model] = span.value("weight", model, name, t, 0.0)
        if span.value("weight", model, name, t, None) is None:
            problems.append(f'weight: is missing for model "{model}"')
    densities = [span.value("density", m, name, t, 1.0) for m in models if kind.sparsify]
    normalize = bool(span.value("normalize", "", name, t, kind.normalize))
    low = "(" if kind.sparsify == "drop" else "["
    problems += [
        f'density: {d:g} of model "{m}" is not in {low}0, 1]'
        for m, d in zip(models, densities, strict=False)
        if not 0 <= d <= 1 or (d == 0 and low == "(")
    ]
    total = sum(weights.values())
    if kind.elect and normalize and min(weights.values()) < 0:
        problems.append(f"weight: must not be negative with {method} and normalize")
    if method == "linear" and normalize and total == 0:
        problems.append("weight: the weights of linear sum to 0; give others, or normalize: false")
    if method == "linear" and not normalize and abs(total - 1) > 1e-6:
        problems.append(
            f"parameters.normalize: false needs weights of sum 1 with linear, not {total:g}"
        )
    divisor = total if normalize and not kind.elect and abs(total) >= 1e-8 else 1.0
    scale = 1.0 if method == "linear" else span.value("lambda_", "", name, t, 1.0)
    return Values([weights[m] / divisor for m in models], densities, scale, normalize)


def _recipe(config: Mergekit, table: Mapping[str, Values]) -> dict[str, Any]:
    """The method with its parameters, weights and scale."""
    method, default = METHODS[config.merge_method], table[min(table, key=_is_layered)]

    def by_name(of: Callable[[Values], Any]) -> dict[str, Any]:
        named = {glob.escape(name): of(values) for name, values in table.items()}
        return {name: value for name, value in named.items() if value != of(default)}

    def per_model(of: Callable[[Values], list[float]]) -> Any:
        patterns, row = by_name(of), of(default)
        return {**patterns, "*": row} if patterns or len(set(row)) > 1 else row[0]

    mean = method.elect and default.normalize
    recipe: dict[str, Any] = {"method": "task_arithmetic"}
    election = {"merge": "mean" if mean else "sum", "zero_sum": "positive"} if method.elect else {}
    if method.sparsify == "trim":
        density = per_model(lambda v: v.densities)
        recipe = {"method": "ties", "density": density, "per_tensor": True, **election}
    elif method.sparsify == "drop":
        rate = per_model(lambda v: [1 - density for density in v.densities])
        inner = {"inner": "ties", "density": 1.0, **election} if method.elect else {}
        recipe = {"method": "dare", "drop_rate": rate, **inner}
    return recipe | {
        "weights": default.weights,
        "weight_patterns": by_name(lambda v: v.weights),
        "server_lr" if mean else "scaling_coef": default.scale,
        "scale_patterns": by_name(lambda v: v.scale),
        "dtype": config.out_dtype or config.dtype,
    }


def _is_layered(name: str) -> bool:
    return LAYER.match(name) is not None


def _notes(config: Mergekit, base: str) -> list[str]:
    """What the file says and makes no difference, and what is done otherwise than in mergekit."""
    name, method = config.merge_method, METHODS[config.merge_method]
    used = {"weight", "normalize"} | ({"lambda"} if name != "linear" else set())
    used |= {"density", "rescale"} if method.sparsify else set()
    notes = [
        f"{path}.{key}: makes no difference" + (" for the base" if of_base else f" with {name}")
        for path, model, given in config.scopes()
        for key in given
        if (of_base := model == base and name != "linear") or key not in used
    ]
    if method.sparsify == "drop":
        notes.append(
            f"{name}: other random numbers than mergekit's, and what is kept is divided by the "
            "density"
        )
    if config.dtype in ("float16", "bfloat16"):
        notes.append(
            "dtype: computed in float32 and rounded once, where mergekit computes in "
            f"{config.dtype}"
        )
    return notes
