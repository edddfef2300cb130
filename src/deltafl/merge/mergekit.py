"""A mergekit configuration as a merge recipe: the same numbers in our terms, or one line for every
key that has none.

The meaning of the keys is that of mergekit 0.1.5. A list of values is interpolated at t, which runs
from 0 to 1 over the layers of a slice (1 if it has one layer) and is 0 outside the layers.
"""

import glob
import math
from collections.abc import Iterator, Mapping
from typing import TypeAlias

from deltafl.checkpoints.stack import LAYER
from deltafl.errors import DeltaflError
from deltafl.merge.mergekit_file import (
    Mergekit,
    SliceSource,
    Tokenizer,
    TokenRow,
    model_named,
)
from deltafl.merge.mergekit_layers import Stacks, places_of, stacks_of
from deltafl.merge.plan import Facts
from deltafl.merge.reading import read_model
from deltafl.merge.recipe import PASSTHROUGH
from deltafl.recipes import read_recipe

Row: TypeAlias = Mapping[str, object]
"""What holds for one tensor: weights, the scale, and the numbers of its rule."""

ELECTS = ("ties", "dare_ties", "della", "breadcrumbs_ties")
"""Methods that elect a sign."""

NORMALIZED = ("linear", "ties", "della")
"""Methods that divide by the sum of weights where nothing is said."""

SAME = ("normalize", "rescale", "filter_wise", "per", "max_iter", "tol", "select_topk")
"""What no tensor may have a value of its own for."""


def translate(data: Mapping[str, object]) -> tuple[Facts, list[str]]:
    """The keys of a `MergeRecipe`, and notes on what has no effect. Reads the models' headers.

    Raises DeltaflError with one line for each key that is wrong or not supported.
    """
    config = read_recipe(Mergekit, data)
    stacks, problems = stacks_of(config), list[str]()
    problems += _conflicts(config, stacks)
    if problems:
        raise DeltaflError(*problems)
    names = [name for name, entry in read_model(stacks.base).entries.items() if entry.floating]
    rows = {
        name: _row(config, stacks, name, number, t, problems)
        for name, (number, t) in places_of(names, config).items()
    }
    problems += [
        f"parameters.{'nuslerp_flatten' if key == 'per' else key}: must be the same for all tensors"
        for key in SAME
        if len({repr(row[key]) for row in rows.values()}) > 1
    ]
    nothing = [0.0] * len(stacks.models)
    if nothing and all(row["weights"] == nothing for row in rows.values()):
        problems.append("weight: all are 0; give a model beside the base another one")
    if problems:
        raise DeltaflError(*dict.fromkeys(problems))
    return _recipe(config, stacks, rows), list(_notes(config, stacks))


def _conflicts(config: Mergekit, stacks: Stacks) -> Iterator[str]:
    """What the method, or a merge as ours, cannot do, known before any tensor's name is."""
    name, kind = config.merge_method, config.kind
    if not kind.whole and not config.base_model:
        yield f"base_model: is missing; {name} merges differences from it"
    for i, part in enumerate(config.parts):
        where = f"slices.{i}: " if config.slices else "models: "
        count = sum(member in stacks.models for member in stacks.sources[i])
        if len({stop - start for start, stop in (s.layer_range for s in part.sources)}) > 1:
            yield f"{where}the sources must have equally many layers"
        if kind.count not in (None, count):
            yield f"{where}{name} takes {kind.count} beside the base, not {count}"


def _row(
    config: Mergekit, stacks: Stacks, name: str, number: int, t: float, problems: list[str]
) -> Row:
    """What holds for one tensor, the weights divided by their sum where that is what normalise
    means.
    """
    part, sources, method = config.parts[number], stacks.sources[number], config.merge_method

    def value(key: str, default: float, source: SliceSource | None = None) -> float:
        found = config.value(key, name, t, part, source)
        return default if found is None else found

    def of_models(key: str, default: float) -> list[float]:
        return [value(key, default, sources.get(member)) for member in stacks.models]

    weighed = "weight" in config.kind.uses
    weights = {m: value("weight", math.nan, s) if weighed else 1.0 for m, s in sources.items()}
    rescale = bool(value("rescale", float(method.startswith(("dare", "della")))))
    if rescale and method.startswith(("ties", "breadcrumbs")):
        problems.append(f"parameters.rescale: must be false with {method}, as it is by default")
    if not value("normalize_weights", 1):
        problems.append("parameters.normalize_weights: must be true, as it is by default")
    if "t" in config.kind.uses and math.isnan(value("t", math.nan)):
        problems.append(f"t: is missing; {method} has no default")
    problems += [
        f'weight: is missing for model "{model}"'
        for (model, _), weight in weights.items()
        if math.isnan(weight)
    ]
    elects, total = method in ELECTS, sum(weights.values())
    normalize = bool(value("normalize", float(method in NORMALIZED)))
    if elects and normalize and min(weights.values(), default=0) < 0:
        problems.append(f"weight: must not be negative with {method} and normalize")
    if method == "linear" and normalize and total == 0:
        problems.append("weight: the weights of linear sum to 0; give others, or normalize: false")
    divided = weighed and normalize and not elects and abs(total) >= 1e-8
    unit = total if divided else 1
    lines = "column" if value("nuslerp_row_wise", 0) else "row"
    only = part.sources[0] if method == "passthrough" else None
    return {
        "weights": [weights.get(member, 0.0) / unit for member in stacks.models],
        "scale": value("lambda_", 1.0) if "lambda_" in config.kind.uses else 1.0,
        "base": total / unit if method == "linear" else value("scale", 1.0, only),
        "normalize": elects and normalize,
        "density": of_models("density", 1.0),
        "drop_rate": [1 - density for density in of_models("density", 1.0)],
        "gamma": of_models("gamma", 0.01),
        "epsilon": of_models("epsilon", 0.15),
        "rescale": rescale,
        "t": [value("t", math.nan)],
        "select_topk": value("select_topk", 1.0),
        "filter_wise": bool(value("filter_wise", 0)),
        "per": "tensor" if value("nuslerp_flatten", 1) else lines,
        "ram": value("epsilon", 1e-5),
        "max_iter": int(value("max_iter", 10)),
        "tol": value("tol", 1e-5),
    }


def _recipe(config: Mergekit, stacks: Stacks, rows: Mapping[str, Row]) -> Facts:
    """The method with its parameters, weights and scale, of the stacks."""
    first = min(rows, key=lambda name: LAYER.match(name) is not None)
    default = rows[first]

    def others(key: str) -> dict[str, object]:
        """Glob on one tensor's name -> the value that is not the default's."""
        found = {glob.escape(name): row[key] for name, row in rows.items()}
        return {name: value for name, value in found.items() if value != default[key]}

    def by_model(key: str) -> dict[str, object]:
        return {**others(key), "*": default[key]}

    by_base = by_model("base")
    base = {
        "base": stacks.base,
        "base_patterns": {} if by_base == {"*": 1.0} else by_base,
        "dtype": config.out_dtype or config.dtype,
        **_vocabulary(config, stacks),
    }
    if not stacks.models:
        return {"method": PASSTHROUGH, **base}
    name, mean = config.merge_method, bool(default["normalize"])
    sums = ("lambda_" in config.kind.uses and not mean) or name == "linear"
    election = {"merge": "mean" if mean else "sum", "zero_sum": "positive"}
    inner = {"inner": "elect", **election} if name in ELECTS else {"inner": "task_arithmetic"}
    rescale = {"rescale": "l1" if default["rescale"] else "none"}
    density, epsilon = ({key: by_model(key)} for key in ("density", "epsilon"))
    t = by_model("t")
    space: dict[str, object] = {"space": "weights" if config.whole else "deltas"}
    known: dict[str, dict[str, object]] = {
        "linear": {"method": "task_arithmetic"},
        "ties": {**density, "per_tensor": True, **election},
        "slerp": {"t": t},
        "nearswap": {"t": t},
        "nuslerp": space | {"per": default["per"]},
        "multislerp": space,
        "karcher": {"iterations": default["max_iter"], "tol": default["tol"]},
        "sce": {"select_topk": default["select_topk"]},
        "model_stock": {"filter_wise": default["filter_wise"]},
        "ram": {"epsilon": default["ram"]},
        "dare": {"drop_rate": by_model("drop_rate"), **rescale, **inner},
        "della": {**density, **epsilon, **rescale, **inner},
        "breadcrumbs": {**density, "gamma": by_model("gamma"), **inner},
    }
    method = name.removesuffix("_ties").removesuffix("_linear")
    rule = {"method": method} | known.get(method, {})
    patterns = {"weight_patterns": others("weights"), "scale_patterns": others("scale")}
    return (
        base
        | rule
        | {
            "models": [*stacks.models.values()],
            "weights": default["weights"],
            "scaling_coef" if sums else "server_lr": default["scale"],
            **patterns,
        }
    )


def _vocabulary(config: Mergekit, stacks: Stacks) -> Facts:
    """Whose tokens the result has, and where their rows come from."""
    told = {"chat_template": config.chat_template}
    source, given = config.tokenizer_source, config.tokenizer or Tokenizer()
    if not source and not config.tokenizer:
        return told
    known = {own: ref for (own, count), ref in stacks.models.items() if not count}
    for own in (config.base_model, config.parts[0].sources[0].model):
        known.setdefault(own or "", stacks.base)

    def row(found: TokenRow) -> dict[str, object]:
        named = found.source if isinstance(found.source, dict) else {"model": found.source}
        told = {key: value for key, value in named.items() if key != "kind" and value is not None}
        if own := model_named(told.get("model")):
            told["model"] = known.get(own, own)
        return told | ({"force": True} if found.force else {})

    source = source or given.source
    return told | {
        "vocabulary": known.get(source, source),
        "tokens": {token: row(found) for token, found in given.tokens.items()},
        "pad_to_multiple_of": given.pad_to_multiple_of,
    }


def _notes(config: Mergekit, stacks: Stacks) -> Iterator[str]:
    """What the file says and makes no difference, and what is done otherwise than in mergekit."""
    name, inputs = config.merge_method, [s for part in config.parts for s in part.sources]
    if not config.whole and any(
        source.model == config.base_model and source.parameters.model_fields_set
        for source in inputs
    ):
        yield "parameters: make no difference for the base"
    for key in sorted(config.given() - config.kind.uses):
        yield f"{key.rstrip('_')}: makes no difference with {name}"
    if name.startswith(("dare", "della")):
        yield f"{name}: other random numbers than mergekit's, whose differ from run to run"
    if not stacks.models and name != PASSTHROUGH:
        yield "models: there is none beside the base, which is written as it is"
    dtypes = {config.dtype, *(source.dtype for source in inputs)}
    for dtype in sorted(dtypes & {"float16", "bfloat16"}, key=str):
        yield f"dtype: computed in float32 and rounded once, where mergekit computes in {dtype}"
