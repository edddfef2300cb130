"""A mergekit configuration as a merge recipe: the same numbers in our terms, or one line for every key that has none.

The meaning of the keys is that of mergekit 0.1.5. A parameter of a model is looked up in its own parameters, then in
those of the slice, then in those of all. A list of values is interpolated at t, which runs from 0 to 1 over the layers
of a slice (1 if it has one layer) and is 0 outside the layers.
"""

import glob
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from deltafl.checkpoints.layout import read_layout
from deltafl.errors import DeltaflError
from deltafl.merge.mergekit.format import METHODS, Mergekit, OfAll, OfModel, scopes_of
from deltafl.merge.plan import entries_in
from deltafl.recipes import parse

Layers: TypeAlias = Mapping[str, tuple[int, int]]
"""Tensor -> (its layer, the number of layers)."""

LAYER = re.compile(r"(|.*?\.)(\d+)\.")
BEFORE_LAYERS = ("embed", "wte", "wpe")
"""Parts of names of what comes before the layers, and so belongs to the first slice."""


@dataclass(frozen=True)
class Span:
    """Layers [start, stop) with the parameters of each model, and of all in the order that they are looked up in."""

    start: int
    stop: float
    models: Mapping[str, OfModel]
    shared: tuple[OfAll, ...]

    def value(self, key: str, model: str | None, name: str, t: float, default: Any) -> Any:
        """A parameter of one tensor, of one model or of all."""
        for scope in (*([self.models[model]] if model else []), *self.shared):
            for part, values in getattr(scope, key, ()):
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
    """What holds for one tensor: a weight and a density for each model beside the base, lambda, and normalize."""

    weights: tuple[float, ...]
    densities: tuple[float, ...]
    scale: float
    normalize: bool


def translate(held: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The keys of a `MergeRecipe`, and notes on what has no effect. Reads the base's headers where names matter.

    Raises DeltaflError with one line for each key that is wrong or not supported.
    """
    config = parse(Mergekit, held)
    spans = spans_of(config)
    models = list(spans[0].models)
    base = config.base_model or (models[0] if config.merge_method == "linear" else "")
    problems = _conflicts(config, base, models)
    if problems:
        raise DeltaflError(*problems)
    layers, names = {}, [""]
    parts = [part for _, _, given in scopes_of(config) for _, setting in given for part in setting]
    if config.slices or any(name or len(values) > 1 for name, values in parts):
        names = [name for name, entry in entries_in(read_layout(base)).items() if entry.floating]
        layers = layers_of(names)
    if config.slices and {depth for _, depth in layers.values()} != {spans[-1].stop}:
        raise DeltaflError(
            f'slices: they end at layer {spans[-1].stop}, and the layers of "{base}" do not'
        )
    table = {}
    for name in names:
        span, t = place_of(name, spans, layers)
        table[name] = _values(config.merge_method, span, base, name, t, problems)
    if len({values.normalize for values in table.values()}) > 1:
        problems.append("parameters.normalize: must be one value for all tensors")
    if problems:
        raise DeltaflError(*dict.fromkeys(problems))
    others = [model for model in models if model != base]
    return {"base": base, "models": others, **_recipe(config, table, layers)}, _notes(config, base)


def spans_of(config: Mergekit) -> list[Span]:
    """The slices, or all layers as one. Raises DeltaflError unless they are all models' same layers, in order."""
    if bool(config.models) == bool(config.slices):
        raise DeltaflError("models: give models, or slices")
    of_all = config.parameters or OfAll()
    if config.models:
        return [
            Span(
                0, math.inf, {x.model: x.parameters or OfModel() for x in config.models}, (of_all,)
            )
        ]
    spans, problems, at = [], [], 0
    for i, part in enumerate(config.slices or ()):
        start, stop = part.sources[0].layer_range
        models = {x.model: x.parameters or OfModel() for x in part.sources}
        spans.append(Span(start, stop, models, (part.parameters or OfAll(), of_all)))
        same = (
            all(x.layer_range == (start, stop) for x in part.sources)
            and models.keys() == spans[0].models.keys()
        )
        if not (same and start == at < stop):
            problems.append(
                f"slices.{i}: must hold the same layers of all models, from layer {at} on"
            )
        at = stop
    if problems:
        raise DeltaflError(*problems)
    return spans


def _conflicts(config: Mergekit, base: str, models: Sequence[str]) -> list[str]:
    """What the method cannot do, known before any tensor's name is."""
    name, method, problems = config.merge_method, METHODS[config.merge_method], []
    if not base:
        problems.append(f"base_model: is missing; {name} merges differences from it")
    elif name == "linear" and base not in models:
        problems.append(
            "base_model: linear merges the models alone; list it among them with its weight"
        )
    if not any(model != base for model in models):
        problems.append("models: there is none beside the base")
    if config.models and len(models) < len(config.models):
        problems.append("models: one is given twice")
    wanted = method.sparsify == "drop"
    for path, _, given in scopes_of(config):
        rescale = dict(given).get("rescale", ())
        if method.sparsify and any(value != wanted for _, values in rescale for value in values):
            problems.append(
                f"{path}.rescale: must be {str(wanted).lower()} with {name}, as it is by default"
            )
    return problems


def layers_of(names: Iterable[str]) -> dict[str, tuple[int, int]]:
    """Tensor -> (its layer, the number of layers): the first number in a name, if under its prefix they run from 0 on.

    One number alone under a prefix counts as a layer only if no prefix has more.
    """
    found = {name: match for name in names if (match := LAYER.match(name))}
    stacks: dict[str, set[int]] = {}
    for match in found.values():
        stacks.setdefault(match[1], set()).add(int(match[2]))
    depths = {prefix: len(held) for prefix, held in stacks.items() if held == set(range(len(held)))}
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
    """What holds for one tensor, the weights divided by their sum where that is what normalise means."""
    kind = METHODS[method]
    models = [m for m in span.models if m != base]
    merged = list(span.models) if method == "linear" else models
    weights = {m: span.value("weight", m, name, t, None) for m in merged}
    densities = (
        tuple(span.value("density", m, name, t, 1.0) for m in models) if kind.sparsify else ()
    )
    normalize = bool(span.value("normalize", None, name, t, kind.normalize))
    problems += [
        f'weight: is missing for model "{m}"' for m, weight in weights.items() if weight is None
    ]
    problems += [
        f'density: {d:g} of model "{m}" is not in {"(" if kind.sparsify == "drop" else "["}0, 1]'
        for m, d in zip(models, densities, strict=False)
        if not 0 <= d <= 1 or (d == 0 and kind.sparsify == "drop")
    ]
    held = {m: weight or 0.0 for m, weight in weights.items()}
    total = sum(held.values())
    if kind.elect and normalize and min(held.values()) < 0:
        problems.append(f"weight: must not be negative with {method} and normalize")
    if method == "linear" and normalize and total == 0:
        problems.append("weight: the weights of linear sum to 0; give others, or normalize: false")
    if method == "linear" and not normalize and abs(total - 1) > 1e-6:
        problems.append(
            f"parameters.normalize: false needs weights of sum 1 with linear, not {total:g}"
        )
    divisor = total if normalize and not kind.elect and abs(total) >= 1e-8 else 1.0
    scale = 1.0 if method == "linear" else span.value("lambda_", None, name, t, 1.0)
    return Values(tuple(held[m] / divisor for m in models), densities, scale, normalize)


def _recipe(config: Mergekit, table: Mapping[str, Values], layers: Layers) -> dict[str, Any]:
    """The method with its parameters, weights and scale."""

    def by_name(of: Callable[[Values], Any]) -> tuple[Any, dict[str, Any]]:
        return patterns_of({name: of(values) for name, values in table.items()}, layers)

    method, values = METHODS[config.merge_method], next(iter(table.values()))
    weights, weight_patterns = by_name(lambda v: list(v.weights))
    scale, scale_patterns = by_name(lambda v: v.scale)
    mean = method.elect and values.normalize
    recipe: dict[str, Any] = {"method": "task_arithmetic"}
    election = {"merge": "mean" if mean else "sum", "zero_sum": "positive"} if method.elect else {}
    if method.sparsify == "trim":
        density, patterns = by_name(lambda v: list(v.densities))
        recipe = {
            "method": "ties",
            "density": _per_model(density, patterns),
            "per_tensor": True,
            **election,
        }
    elif method.sparsify == "drop":
        rate, patterns = by_name(lambda v: [1 - density for density in v.densities])
        inner = {"inner": "ties", "density": 1.0, **election} if method.elect else {}
        recipe = {"method": "dare", "drop_rate": _per_model(rate, patterns), **inner}
    return recipe | {
        "weights": weights,
        "weight_patterns": weight_patterns,
        "server_lr" if mean else "scaling_coef": scale,
        "scale_patterns": scale_patterns,
        "dtype": config.out_dtype or config.dtype,
    }


def _per_model(default: Sequence[float], patterns: Mapping[str, Any]) -> Any:
    """One number where all are equal, or every pattern's, of which the last is of all other tensors."""
    return {**patterns, "*": default} if patterns or len(set(default)) > 1 else default[0]


def patterns_of(table: Mapping[str, Any], layers: Layers) -> tuple[Any, dict[str, Any]]:
    """The value of what is outside the layers, and glob -> value of the others: for a whole layer where it is one."""
    default = next(
        (value for name, value in table.items() if name not in layers), next(iter(table.values()))
    )
    groups: dict[str, dict[str, Any]] = {}
    for name, value in table.items():
        match = LAYER.match(name) if name in layers else None
        groups.setdefault(match[0] if match else name, {})[name] = value
    found = {}
    for group, held in groups.items():
        first = next(iter(held.values()))
        whole = group not in held and all(value == first for value in held.values())
        named = (
            {glob.escape(group) + "*": first}
            if whole
            else {glob.escape(n): value for n, value in held.items()}
        )
        found |= {pattern: value for pattern, value in named.items() if value != default}
    return default, found


def _notes(config: Mergekit, base: str) -> list[str]:
    """What the file says and makes no difference, and what is done otherwise than in mergekit."""
    name, method = config.merge_method, METHODS[config.merge_method]
    used = {"weight", "normalize"} | ({"lambda"} if name != "linear" else set())
    used |= {"density", "rescale"} if method.sparsify else set()
    notes = [
        f"{path}.{key}: makes no difference" + (" for the base" if of_base else f" with {name}")
        for path, model, given in scopes_of(config)
        for key, _ in given
        if (of_base := model == base and name != "linear") or key not in used
    ]
    if method.sparsify == "drop":
        notes.append(
            f"{name}: other random numbers than mergekit's, and what is kept is divided by the density"
        )
    if config.dtype in ("float16", "bfloat16"):
        notes.append(
            f"dtype: computed in float32 and rounded once, where mergekit computes in {config.dtype}"
        )
    return notes
