"""The preflight of a merge: everything that headers and metadata tell, compared before any tensor
is read.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, TypeAlias

from deltafl.checkpoints.adapter import Adapter
from deltafl.checkpoints.align import Alignment, align
from deltafl.checkpoints.layout import SIZES, Entry, Layout
from deltafl.checkpoints.tokenizer import chat_template
from deltafl.errors import DeltaflError, attempt, did_you_mean, shorten
from deltafl.merge.reading import (
    Training,
    other_base,
    read_base,
    read_model_or_adapter,
    read_training,
    source_of,
)
from deltafl.merge.recipe import PASSTHROUGH, MergeRecipe
from deltafl.merge.vocabulary import Matching, match_vocabularies
from deltafl.rules.building import build_rule
from deltafl.rules.rule import RUNNING, ExampleRule, Rule, Source, TensorRule, check_rule
from deltafl.rules.task_arithmetic import TaskArithmetic

Facts: TypeAlias = dict[str, Any]
"""What is told or recorded, as JSON holds it."""


NOTHING = TaskArithmetic()
"""In place of the rule of a merge without models."""


@dataclass(frozen=True)
class Plan:
    """A merge that has passed the preflight.

    layouts: of the models, by name. adapters: those that are one. training: what the training.json
    of each says. text: the folder whose tokenizer is written, with `chat_template` in place of its
    own. matching: how rows are found by token, if not by their number.
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
    matching: Matching | None = None
    chat_template: str | None = None

    @property
    def entries(self) -> Mapping[str, Entry]:
        """Of the output, but for its dtype."""
        return self.matching.entries[""] if self.matching else self.base.entries

    @property
    def inputs(self) -> tuple[Layout, ...]:
        """The base and the models."""
        return (self.base, *self.layouts.values())

    @property
    def num_elements(self) -> int:
        """Of one delta."""
        return sum(self.entries[name].numel for name in self.alignment.merged)

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
        if self.recipe.adapter:
            shapes = (self.base.entries[name].shape for name in self.alignment.merged)
            ranked = ((min(self.recipe.as_adapter or 1 << 30, *s), s) for s in shapes if s[1:])
            return SIZES[stored or "F32"] * sum(r * sum(s) for r, s in ranked if len(s) == 2)
        return sum(
            entry.numel * SIZES[stored if stored and entry.floating else entry.dtype]
            for entry in self.entries.values()
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
        if self.recipe.adapter or whole:  # in float64
            elements, width = max(self.entries[n].numel for n in self.alignment.merged), 16
        return self.threads * elements * width * (2 * len(self.layouts) + 6)

    def refuse_as_output(self, out: str | Path) -> None:
        """Raise DeltaflError if writing `out` would touch an input."""
        target = Path(out).resolve()
        for layout in self.inputs:
            folders = layout.folder, *(file.parent for file in layout.files)
            sources = {folder.resolve() for folder in folders}
            if any(target == source or target in source.parents for source in sources):
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
    passed = recipe.method == PASSTHROUGH
    rule = NOTHING if passed else attempt(problems, build_rule, recipe.method, recipe.params)
    base = attempt(problems, read_base, recipe.base)
    sources, layouts, training = [], dict[str, Layout](), dict[str, Training]()
    adapters, labels = dict[str, Adapter](), {"base": "", recipe.base: ""}
    for name, model in recipe.entries.items():
        if found := attempt(problems, read_model_or_adapter, model.path):
            layouts[name], adapter = found
            if adapter:
                adapters[name] = adapter
            training[name] = attempt(problems, read_training, layouts[name]) or Training()
            if base and (warning := other_base(name, training[name], base, adapter)):
                (notes if recipe.allow_other_base else problems).append(warning)
            labels |= {name: name, model.path: name}
        sources.append(source_of(name, model, training.get(name, Training())))
    if rule and not passed:
        attempt(problems, check_rule, rule, sources)
    if base is None:
        raise DeltaflError(*problems)
    every, wanted = {"": base, **layouts}, recipe.tokenizer_from or recipe.vocabulary or "base"
    if recipe.tokenizer_from and wanted not in labels:
        known = did_you_mean(wanted, layouts)
        problems.append(f'--tokenizer-from "{wanted}" is no model of this merge; {known}')
    folders, matching = [layout.folder for layout in every.values()], None
    template = attempt(problems, chat_template, recipe.chat_template, folders)
    if recipe.vocabulary:
        if rule and isinstance(rule.core, ExampleRule):
            problems.append(f"vocabulary: {recipe.method} runs models, which have the base's")
        whole = {label: one for label, one in every.items() if label not in adapters}
        matching = attempt(problems, match_vocabularies, recipe, whole, labels)
        if matching is None:
            raise DeltaflError(*problems)
    alignment = _aligned(recipe, every, adapters, matching)
    problems += alignment.problems
    if problems or not rule:
        raise DeltaflError(*problems)
    return Plan(
        recipe,
        rule,
        base,
        layouts,
        adapters,
        training,
        alignment,
        every["" if recipe.vocabulary == "union" else labels.get(wanted, "")].folder,
        tuple(sources),
        (*alignment.notes, *notes),
        matching,
        template,
    )


def _notes(recipe: MergeRecipe, alignment: Alignment, inputs: Sequence[Layout]) -> Iterator[str]:
    """What a user should know beside what the alignment says itself; inputs: the base first."""
    for name in alignment.merged if recipe.as_adapter else ():
        shape = inputs[0].entries[name].shape
        if len(shape) == 2 and min(shape) < (recipe.as_adapter or 0):
            yield f'"{name}" is {shape}: its rank is at most {min(shape)}'
    for layout in (layout for layout in inputs if layout.passed_over):
        found = shorten(layout.passed_over)
        yield f'"{layout.ref}": {layout.files[0].name} is read, not {found}'
    if running := sum(name.endswith(RUNNING) for name in alignment.merged):
        yield f"{running} running statistics are averaged, never extrapolated"


def _aligned(
    recipe: MergeRecipe,
    layouts: Mapping[str, Layout],
    adapters: Mapping[str, Adapter],
    matching: Matching | None,
) -> Alignment:
    """What is merged of which model, "" being the base; with what is wrong about it."""
    held = {label: adapters.get(label, one).entries for label, one in layouts.items()}
    held |= matching.entries if matching else {}
    found = align(
        held.pop(""),
        held,
        scope=recipe.scope,
        include=recipe.include,
        exclude=recipe.exclude,
        adapters=adapters,
        dtype=recipe.stored_dtype or ("F32" if recipe.adapter else None),
    )
    found.notes += _notes(recipe, found, [*layouts.values()])
    if matching:
        found.problems += matching.problems(found)
        found.notes += matching.notes
    for key in ("weight_patterns", "scale_patterns", "base_patterns"):
        for pattern in dict(recipe)[key] if found.merged else ():
            if not any(fnmatchcase(name, pattern) for name in found.merged):
                found.problems.append(f'{key}: "{pattern}" matches no merged tensor')
    return found
