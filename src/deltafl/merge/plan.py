"""The preflight of a merge: everything that headers and metadata tell, compared before any tensor
is read.
"""

import dataclasses
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, TypeAlias

from pydantic import ConfigDict

from deltafl.checkpoints.adapter import Adapter, read_adapter
from deltafl.checkpoints.align import Alignment, align
from deltafl.checkpoints.layout import SIZES, Layout, fingerprint, read_layout
from deltafl.errors import DeltaflError, attempt, did_you_mean
from deltafl.merge.recipe import MergeRecipe, ModelEntry
from deltafl.recipes import R, Recipe, read_recipe
from deltafl.rules.rule import Rule, Source, TensorRule, build_rule, check_rule

Facts: TypeAlias = dict[str, Any]
"""What is told or recorded, as JSON holds it."""

LAYER = re.compile(r"(.*?\b(?:layers?|(?:res)?blocks?|h))\.(\d+)\.")
"""The beginning of a tensor's name: its stack of layers, and its layer's number."""


class Training(Recipe):
    """What training.json beside a model's weights says; other keys are let be."""

    model_config = ConfigDict(extra="ignore")

    num_examples: int | None = None
    num_steps: int | None = None
    lr: float | None = None
    momentum: float | None = None
    prox_mu: float | None = None
    seed: int | None = None
    base: dict[str, object] | None = None
    task: object = None
    epochs: object = None
    batch_size: object = None
    optimizer: object = None


@dataclass(frozen=True)
class Plan:
    """A merge that has passed the preflight.

    layouts: of the models, by name. adapters: those that are one. training: what the training.json
    of each says. text: the folder whose tokenizer is written.
    """

    recipe: MergeRecipe
    rule: Rule
    base: Layout
    layouts: Mapping[str, Layout]
    adapters: Mapping[str, Adapter]
    training: Mapping[str, Training]
    alignment: Alignment
    text: Path
    sources: tuple[Source, ...]
    notes: tuple[str, ...]

    @property
    def inputs(self) -> tuple[Layout, ...]:
        """The base and the models."""
        return (self.base, *self.layouts.values())

    @property
    def num_elements(self) -> int:
        """Of one delta."""
        return sum(self.base.entries[name].numel for name in self.alignment.merged)

    @property
    def files(self) -> list[Path]:
        """All files that are read."""
        return [file for layout in self.inputs for file in layout.files]

    @property
    def passes(self) -> int:
        """How often all inputs are read; once or twice more where a threshold is guessed badly."""
        thresholds = sum(t.density is not None for t in self.rule.transforms)
        return 1 + thresholds + self.rule.core.needs_gram

    @property
    def bytes_read(self) -> int:
        """In all passes."""
        return self.passes * sum(layout.num_bytes for layout in self.inputs)

    @property
    def bytes_written(self) -> int:
        """Of the output's weights."""
        stored = self.recipe.stored_dtype
        if rank := self.recipe.as_adapter:
            shapes = (self.base.entries[name].shape for name in self.alignment.merged)
            return rank * SIZES[stored or "F32"] * sum(sum(s) for s in shapes if len(s) == 2)
        return sum(
            entry.numel * SIZES[stored if stored and entry.floating else entry.dtype]
            for entry in self.base.entries.values()
        )

    @property
    def threads(self) -> int:
        """As the recipe says, or one for each core, at most 8."""
        return self.recipe.threads or min(8, os.cpu_count() or 1)

    @property
    def working_memory(self) -> int:
        """Bytes of the blocks, or of a rule of whole tensors these, that are in work at a time."""
        elements, width = 1 << 18, 8 if self.recipe.exact else 4
        whole = isinstance(self.rule.core, TensorRule) or any(t.whole for t in self.rule.transforms)
        if self.recipe.as_adapter or whole:  # in float64
            elements, width = max(self.base.entries[n].numel for n in self.alignment.merged), 16
        return self.threads * elements * width * (2 * len(self.layouts) + 6)

    def refuse_as_output(self, out: str | Path) -> None:
        """Raise DeltaflError if writing `out` would touch an input."""
        target = Path(out).resolve()
        for layout in self.inputs:
            source = layout.folder.resolve()
            if target == source or target in source.parents:
                raise DeltaflError(
                    f'--out "{out}" is, or holds, the input "{layout.ref}"; choose another folder'
                )


def plan_merge(recipe: MergeRecipe) -> Plan:
    """The preflight: names, shapes and dtypes of all models against the base, and the rule against
    what is known.

    Reads headers only; torch is imported only for torch state dicts. Raises DeltaflError with every
    problem at once.
    """
    problems, notes = list[str](), list[str]()
    rule = attempt(problems, build_rule, recipe.method, recipe.params)
    base = attempt(problems, read_base, recipe.base)
    sources, layouts, training = [], dict[str, Layout](), dict[str, Training]()
    adapters, folders = dict[str, Adapter](), dict[str, Path]()
    for name, model in recipe.entries.items():
        if found := attempt(problems, read_model_or_adapter, model.path):
            layouts[name], adapter = found
            if adapter:
                adapters[name] = adapter
            training[name] = attempt(problems, read_training, layouts[name]) or Training()
            if base and (warning := other_base(name, training[name], base, adapter)):
                (notes if recipe.allow_other_base else problems).append(warning)
            folders |= dict.fromkeys((name, model.path), layouts[name].folder)
        sources.append(source_of(name, model, training.get(name, Training())))
    if rule:
        attempt(problems, check_rule, rule, sources)
    if base is None:
        raise DeltaflError(*problems)
    wanted, folders = recipe.tokenizer_from or recipe.base, {recipe.base: base.folder} | folders
    if wanted not in folders:
        known = did_you_mean(wanted, layouts)
        problems.append(f'--tokenizer-from "{wanted}" is no model of this merge; {known}')
    alignment = align(
        base.entries,
        {name: adapters.get(name, layout).entries for name, layout in layouts.items()},
        scope=recipe.scope,
        include=recipe.include,
        exclude=recipe.exclude,
        adapters=adapters,
    )
    problems += alignment.problems
    for key in ("weight_patterns", "scale_patterns"):
        for pattern in dict(recipe)[key] if alignment.merged else ():
            if not any(fnmatchcase(name, pattern) for name in alignment.merged):
                problems.append(f'{key}: "{pattern}" matches no merged tensor')
    if problems or not rule:
        raise DeltaflError(*problems)
    told = (*alignment.notes, *notes)
    return Plan(
        recipe,
        rule,
        base,
        layouts,
        adapters,
        training,
        alignment,
        folders[wanted],
        tuple(sources),
        told,
    )


def read_model(ref: str) -> Layout:
    """The layout of a model with its entries; a torch state dict is opened for them."""
    layout = read_layout(ref)
    if not layout.pickled:
        return layout
    from deltafl.checkpoints.checkpoint import entries_of, open_tensors

    return dataclasses.replace(layout, entries=entries_of(open_tensors(layout)))


def read_model_or_adapter(ref: str) -> tuple[Layout, Adapter | None]:
    """The layout of a model, or of an adapter and what that is."""
    layout = read_model(ref)
    return layout, read_adapter(layout)


def read_base(ref: str) -> Layout:
    """The layout of a model that is no adapter."""
    layout, adapter = read_model_or_adapter(ref)
    if adapter:
        raise DeltaflError(
            f'base "{ref}" is an adapter; make it a model: '
            f"deltafl merge --base {adapter.base} --models {ref} --out DIR"
        )
    return layout


def read_training(layout: Layout) -> Training:
    """Raises DeltaflError if it cannot be right. Without the file nothing is known."""
    file = layout.folder / "training.json"
    return read_json(Training, file) if file.is_file() else Training()


def read_json(kind: type[R], file: Path) -> R:
    """What a file says. Raises DeltaflError, naming the file, if it cannot be right."""
    problems = list[str]()
    try:
        found = attempt(problems, read_recipe, kind, {**json.loads(file.read_text())})
    except (ValueError, TypeError):
        found, problems = None, ["is not a JSON object"]
    if found is None:
        raise DeltaflError(*(f'"{file}": {line}; mend or remove it' for line in problems))
    return found


def source_of(name: str, model: ModelEntry, trained: Training) -> Source:
    """The Source of a model: what the user says goes before what training.json says."""
    told = {key: value for key, value in model if value is not None}
    known = {**dict(trained), **told, "name": name}
    return Source(**{field.name: known[field.name] for field in dataclasses.fields(Source)})


def other_base(
    name: str, trained: Training, base: Layout, adapter: Adapter | None = None
) -> str | None:
    """A line if training.json records a base with another fingerprint than this one, or an adapter
    is one of another base.
    """
    recorded = trained.base or {}
    if adapter.fits(base) if adapter else recorded.get("fingerprint") in (None, fingerprint(base)):
        return None
    known = adapter.base if adapter else recorded.get("id", "unknown")
    return (
        f'model "{name}": was fine-tuned from another base ("{known}") '
        f'than "{base.ref}"; give that base, or insist with --allow-other-base'
    )
