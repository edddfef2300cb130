"""One-shot merging: one server step over checkpoints on disk, written and recorded."""

import functools
import json
import platform
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import torch

from deltafl.algebra.aggregate import Stepped
from deltafl.algebra.tensors import Lazy, lazy
from deltafl.checkpoints.adapter import CONFIG
from deltafl.checkpoints.checkpoint import torch_dtype
from deltafl.checkpoints.layout import ADAPTER, identity
from deltafl.checkpoints.stack import write_depth
from deltafl.checkpoints.tokenizer import text_differences, text_files, write_template
from deltafl.checkpoints.vocabulary import write_vocabulary
from deltafl.checkpoints.writing import (
    INDEX,
    companions,
    copy_files,
    plan_shards,
    write_tensors,
)
from deltafl.files import atomic_folder
from deltafl.merge.as_adapter import write_lora
from deltafl.merge.card import model_card
from deltafl.merge.inputs import Opened, large_deltas, open_updates
from deltafl.merge.plan import Facts, Plan
from deltafl.progress import OnProgress, ignore
from deltafl.rules.weights import first_match, total_weight
from deltafl.version import __version__

VERSIONS = {
    "deltafl": __version__,
    "python": platform.python_version(),
    "torch": torch.__version__,
}

OWN = ("deltafl.json", "README.md")
"""What is written beside weights and what is copied: the record and the card."""


def run_merge(
    plan: Plan,
    out: str | Path,
    *,
    overwrite: bool = False,
    on_progress: OnProgress = ignore,
    make: Callable[[Opened], tuple[Lazy, Facts]] | None = None,
    rows: Sequence[Facts] = (),
) -> Facts:
    """Merge and write the directory `out`, whole or not at all; returns what deltafl.json records.

    on_progress: told of each pass over the models, by name. make: the update at mean scale and what
    there is to report of it, of a rule that needs more than deltas (see `ExampleRule`). rows: test
    scores for the card.

    Raises:
        DeltaflError: bad input that only reading shows (NaN, a file that changed); `out` exists.
        OSError: the disk is full, or fails.
    """
    recipe, threads, weights = plan.recipe, plan.threads, plan.recipe.model_weights
    plan.refuse_as_output(out)

    @functools.cache
    def scale(name: str) -> float:
        """What multiplies the mean-scale update of a tensor."""
        number = first_match(name, recipe.scale_patterns, recipe.scale)
        return number if recipe.scaling_coef is None else number * total_weight(weights, name)

    with atomic_folder(out, overwrite=overwrite) as folder:
        opened, dtype = open_updates(plan), recipe.stored_dtype
        update, report = lazy({}), Facts()
        if make is not None:
            update, report = make(opened)
        elif plan.layouts:
            update = made = opened.aggregate(plan.rule, on_progress)
            report = made.report
        if recipe.adapter:
            report = report | write_lora(plan, update, scale, folder, on_progress)
        else:
            whole = torch_dtype(dtype) if dtype else None
            factors = {n: first_match(n, recipe.base_patterns, 1.0) for n in plan.entries}
            of_base = {n: factor for n, factor in factors.items() if factor != 1}
            stepped = Stepped(opened.base, update, scale, dtype=whole, of_base=of_base)
            shards = plan_shards(plan.entries, dtype, recipe.max_shard_size)
            write_tensors(stepped, shards, folder, threads=threads, on_progress=on_progress)
        copy_files(copied_files(plan), folder, dtype)
        if plan.base.ranges and (folder / "config.json").exists():
            write_depth(folder / "config.json", plan.base.ranges)
        if matching := plan.matching:
            write_vocabulary(matching.vocabulary, plan.text, folder)
        if plan.chat_template:
            write_template(plan.chat_template, folder)
        # only now that all is in the page cache: its reads here and there would wait
        warnings = [*large_deltas(opened), *other_texts(plan)]
        record = {**describe(plan), "warnings": warnings, **report}
        card = model_card(plan, record, Path(out).resolve().name, rows)
        for name, text in zip(OWN, (json.dumps(record, indent=2), card), strict=True):
            (folder / name).write_text(text)
    return record


def copied_files(plan: Plan) -> list[Path]:
    """The base's files beside its weights, and those of the chosen text."""
    folder, marks = plan.base.folder, ("config.json", "deltafl_model.json")
    if not any((folder / mark).exists() for mark in marks):
        return []
    return [*([] if plan.recipe.adapter else companions(folder)), *text_files(plan.text)]


def written_files(plan: Plan) -> list[str]:
    """Names of the files of the output."""
    recipe, names = plan.recipe, [ADAPTER, CONFIG]
    if not recipe.adapter:
        shards = plan_shards(plan.entries, recipe.stored_dtype, recipe.max_shard_size)
        names = [shard.file.name for shard in shards] + [INDEX] * (len(shards) > 1)
    return sorted([*names, *OWN, *(file.name for file in copied_files(plan))])


def other_texts(plan: Plan) -> list[str]:
    """A warning for each model whose text differs from that of the base, unless one was chosen."""
    recipe = plan.recipe
    chosen = recipe.tokenizer_from or recipe.vocabulary not in (None, "union")
    option = "--vocabulary" if recipe.vocabulary else "--tokenizer-from"
    settled = {"chat template"} if plan.chat_template else set[str]()
    differ = functools.partial(text_differences, plan.base.folder)
    return [
        f'model "{name}": not the {" and ".join(odd)} of the base, which is written; '
        f"choose with {option} {name}"
        for name, layout in (() if chosen else plan.layouts.items())
        if (odd := [what for what in differ(layout.folder) if what not in settled])
    ]


def describe(plan: Plan) -> Facts:
    """The record of a merge: its recipe, inputs by identity, both scales, what was left out,
    versions.
    """
    recipe, weights = plan.recipe, plan.recipe.model_weights["*"]
    total, by_sum = sum(map(abs, weights)), recipe.scaling_coef is not None
    server_lr = recipe.scale * total if by_sum else recipe.scale
    hashed = functools.partial(identity, full_hash=recipe.hash)
    with ThreadPoolExecutor(plan.threads) as pool:  # hashing leaves the interpreter's lock
        base, *models = pool.map(hashed, plan.inputs)
    return {
        "deltafl": __version__,
        **recipe.content(),
        "base": base,
        "models": [
            {**own, "source": asdict(source)}
            for own, source in zip(models, plan.sources, strict=True)
        ],
        "params": dict(recipe.params),
        "server_lr": server_lr,
        "scaling_coef": server_lr / total if total else recipe.scaling_coef,
        "weights": weights,
        "merged_tensors": len(plan.alignment.merged),
        "merged_elements": plan.num_elements,
        "copied": plan.alignment.copied,
        "ignored": plan.alignment.ignored,
        "notes": plan.notes,
        "versions": VERSIONS,
    }
