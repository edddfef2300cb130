"""One-shot merging: one server step over checkpoints on disk, written and recorded."""

import dataclasses
import functools
import json
import platform
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from deltafl.algebra.aggregate import Aggregate, Stepped
from deltafl.checkpoints import layout as layouts
from deltafl.checkpoints.checkpoint import entries_of, torch_dtype
from deltafl.checkpoints.writing import copy_companions, plan_shards, write_tensors
from deltafl.files import atomic_folder
from deltafl.merge.inputs import Opened, large_deltas, open_updates
from deltafl.merge.plan import Plan
from deltafl.merge.recipe import MergeRecipe
from deltafl.progress import OnProgress, ignore
from deltafl.rules.weights import Weights, first_match, total_weight
from deltafl.version import __version__


def step_scale(recipe: MergeRecipe, weights: Weights) -> Callable[[str], float]:
    """What multiplies the mean-scale update of a tensor: server_lr, by default 1, or lambda's
    equivalent.
    """
    given = recipe.server_lr if recipe.scaling_coef is None else recipe.scaling_coef

    def scale(name: str) -> float:
        number = first_match(name, recipe.scale_patterns, 1.0 if given is None else given)
        return number if recipe.scaling_coef is None else number * total_weight(weights, name)

    return functools.cache(scale)


def run_merge(
    plan: Plan,
    out: str | Path,
    *,
    overwrite: bool = False,
    on_progress: OnProgress = ignore,
) -> dict[str, Any]:
    """Merge and write the directory `out`, whole or not at all; returns what deltafl.json records.

    on_progress: told of each pass over the models, by name.

    Raises:
        DeltaflError: bad input that only reading shows (NaN, a file that changed); `out` exists.
        OSError: the disk is full, or fails.
    """
    recipe = plan.recipe
    plan.refuse_as_output(out)
    with atomic_folder(out, overwrite=overwrite) as folder, open_updates(plan) as opened:
        aggregate = Aggregate(
            plan.rule,
            opened.updates,
            opened.weights,
            dtype=opened.dtype,
            threads=plan.threads,
            on_progress=on_progress,
        )
        dtype = torch_dtype(recipe.stored_dtype) if recipe.stored_dtype else None
        scale = step_scale(recipe, opened.weights)
        stepped = Stepped(opened.base, aggregate, scale, dtype=dtype)
        shards = plan_shards(entries_of(opened.base), recipe.stored_dtype, recipe.max_shard_size)
        write_tensors(
            stepped,
            shards,
            folder,
            threads=plan.threads,
            on_progress=on_progress,
        )
        if any(
            (plan.base.folder / mark).exists() for mark in ("config.json", "deltafl_model.json")
        ):
            copy_companions(plan.base.folder, folder, recipe.stored_dtype)
        warnings = large_deltas(
            opened
        )  # only now that all is in the page cache: its reads here and there would wait
        record = describe(plan, opened, aggregate, warnings)
        (folder / "deltafl.json").write_text(json.dumps(record, indent=2))
    return record


def describe(
    plan: Plan, opened: Opened, aggregate: Aggregate, warnings: Sequence[str]
) -> dict[str, Any]:
    """The record of a merge: inputs by identity, rule, parameters, both scales, what was left out,
    versions.
    """
    recipe, total = plan.recipe, sum(map(abs, opened.weights["*"]))
    if recipe.scaling_coef is not None:
        server_lr = total * recipe.scaling_coef
    else:
        server_lr = 1.0 if recipe.server_lr is None else recipe.server_lr
    inputs = [plan.base, *(plan.layouts[s.name] for s in plan.sources)]
    with ThreadPoolExecutor(
        plan.threads
    ) as pool:  # hashing leaves the interpreter's lock to others
        base, *models = pool.map(functools.partial(layouts.identity, full_hash=recipe.hash), inputs)
    return {
        "deltafl": __version__,
        "base": base,
        "models": [
            {**own, "source": dataclasses.asdict(s)}
            for own, s in zip(models, plan.sources, strict=True)
        ],
        "method": recipe.method,
        "params": dict(recipe.params),
        "server_lr": server_lr,
        "scaling_coef": server_lr / total if total else recipe.scaling_coef,
        "scale_patterns": [list(pair) for pair in recipe.scale_patterns.items()],
        "weights": list(opened.weights["*"]),
        "weight_patterns": [list(pair) for pair in recipe.weight_patterns.items()],
        "scope": recipe.scope,
        "include": list(recipe.include),
        "exclude": list(recipe.exclude),
        "dtype": recipe.stored_dtype,
        "exact": recipe.exact,
        "merged_tensors": len(plan.alignment.merged),
        "merged_elements": plan.num_elements,
        "copied": plan.alignment.copied,
        "ignored": plan.alignment.ignored,
        "notes": list(plan.notes),
        "warnings": list(warnings),
        **aggregate.report,
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }
