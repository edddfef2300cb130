"""The preflight of a merge: everything that headers and metadata tell, compared before any tensor
is read.
"""

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from pydantic import ConfigDict

from deltafl.checkpoints import layout as layouts
from deltafl.checkpoints.align import Alignment, align
from deltafl.checkpoints.layout import SIZES, Layout
from deltafl.errors import DeltaflError
from deltafl.merge.recipe import MergeRecipe, ModelEntry
from deltafl.recipes import Recipe, read_recipe
from deltafl.rules.rule import Rule, Source, TensorRule, build_rule, check_rule


@dataclass(frozen=True)
class Plan:
    """A merge that has passed the preflight. `entries`: the base's tensors by name; `layouts`: the
    models' files.
    """

    recipe: MergeRecipe
    rule: Rule
    base: Layout
    entries: Mapping[str, Any]
    layouts: Mapping[str, Layout]
    alignment: Alignment
    sources: tuple[Source, ...]
    notes: tuple[str, ...]

    @property
    def num_elements(self) -> int:
        """Of one delta."""
        return sum(self.entries[name].numel for name in self.alignment.merged)

    @property
    def passes(self) -> int:
        """How often all inputs are read; once or twice more where a threshold is guessed badly."""
        thresholds = sum(t.density is not None for t in self.rule.transforms)
        return 1 + thresholds + self.rule.core.needs_gram

    @property
    def bytes_read(self) -> int:
        """In all passes."""
        layouts = (self.base, *self.layouts.values())
        return self.passes * sum(layout.num_bytes for layout in layouts)

    @property
    def bytes_written(self) -> int:
        """Of the output's weights."""
        width = SIZES.get(self.recipe.stored_dtype or "", 0)
        return sum(
            entry.numel * (width if width and entry.floating else SIZES[entry.dtype])
            for entry in self.entries.values()
        )

    @property
    def threads(self) -> int:
        """As the recipe says, or one for each core, at most 8."""
        return self.recipe.threads or min(8, os.cpu_count() or 1)

    @property
    def working_memory(self) -> int:
        """Bytes of the blocks, or of a `TensorRule` the tensors, that are in work at a time."""
        elements, width = 1 << 18, 8 if self.recipe.exact else 4
        if isinstance(self.rule.core, TensorRule):  # which compute in float64
            elements, width = max(self.entries[n].numel for n in self.alignment.merged), 16
        return self.threads * elements * width * (2 * len(self.layouts) + 6)

    @property
    def files(self) -> list[Path]:
        """All files that are read."""
        return [file for layout in (self.base, *self.layouts.values()) for file in layout.files]

    def refuse_as_output(self, out: str | Path) -> None:
        """Raise DeltaflError if writing `out` would touch an input."""
        target = Path(out).resolve()
        for layout in (self.base, *self.layouts.values()):
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
    problems: list[str] = []

    def attempt(work: Callable[[], Any]) -> Any:
        try:
            return work()
        except DeltaflError as error:
            problems.extend(error.problems)
            return None

    rule = attempt(lambda: build_rule(recipe.method, recipe.params))
    base = attempt(lambda: layouts.read_layout(recipe.base))
    models = recipe.entries
    found = {name: attempt(lambda m=m: layouts.read_layout(m.path)) for name, m in models.items()}
    entries = {
        label: attempt(lambda x=x: entries_in(x)) for label, x in {"": base, **found}.items() if x
    }
    sources, notes = [], []
    for name, model in models.items():
        layout = found[name]
        trained = attempt(lambda layout=layout: read_training(layout)) if layout else {}
        sources.append(source_of(name, model, trained or {}))
        if layout and base and trained:
            warning = other_base(name, trained, base)
            (notes if recipe.allow_other_base else problems).extend([warning] if warning else [])
    if rule and sources:
        attempt(lambda: check_rule(rule, sources))
    if base is None or entries[""] is None:
        raise DeltaflError(*problems)
    alignment = align(
        entries[""],
        {name: entries[name] for name in found if entries.get(name) is not None},
        scope=recipe.scope,
        include=recipe.include,
        exclude=recipe.exclude,
    )
    problems += alignment.problems
    problems += [
        f'{key}: "{pattern}" matches no merged tensor'
        for key, patterns in (
            ("weight_patterns", recipe.weight_patterns),
            ("scale_patterns", recipe.scale_patterns),
        )
        for pattern in patterns
        if alignment.merged and not any(fnmatchcase(name, pattern) for name in alignment.merged)
    ]
    if problems:
        raise DeltaflError(*problems)
    told = (*alignment.notes, *notes)
    return Plan(recipe, rule, base, entries[""], found, alignment, tuple(sources), told)


def entries_in(layout: Layout) -> Mapping[str, Any]:
    """Name -> entry of every tensor; a torch state dict is opened for it."""
    if not layout.pickled:
        return layout.entries
    from deltafl.checkpoints.checkpoint import entries_of, open_tensors

    return entries_of(open_tensors(layout))


class _Training(Recipe):
    """What of a training.json must be right where it is there."""

    model_config = ConfigDict(extra="ignore")

    num_examples: int | None = None
    num_steps: int | None = None
    seed: int | None = None
    lr: float | None = None
    momentum: float | None = None
    prox_mu: float | None = None
    base: dict[str, Any] | None = None


def read_training(layout: Layout) -> dict[str, Any]:
    """What training.json beside the weights says; {} if there is none. Raises DeltaflError if it
    cannot be right.
    """
    file = layout.folder / "training.json"
    if not file.is_file():
        return {}
    try:
        data = json.loads(file.read_text())
        problems = [] if isinstance(data, dict) else ["is not a JSON object"]
        read_recipe(_Training, data if isinstance(data, dict) else {})
    except ValueError:
        problems = ["is not valid JSON"]
    except DeltaflError as error:
        problems = list(error.problems)
    if problems:
        raise DeltaflError(*(f'"{file}": {line}; mend or remove it' for line in problems))
    return data


def source_of(name: str, model: ModelEntry, trained: Mapping[str, Any]) -> Source:
    """The Source of a model: what the user says goes before what training.json says."""
    told = {k: v for k, v in model if v is not None and k in ("num_steps", "num_examples")}
    known = {k: trained.get(k) for k in _Training.model_fields if k not in ("seed", "base")}
    return Source(name, **known | told)


def other_base(name: str, trained: Mapping[str, Any], base: Layout) -> str | None:
    """A line if training.json records a base with another fingerprint than this one."""
    recorded = trained.get("base") or {}
    if not recorded.get("fingerprint") or recorded["fingerprint"] == layouts.fingerprint(base):
        return None
    other = recorded.get("id", "unknown")
    return (
        f'model "{name}": was fine-tuned from another base ("{other}") than "{base.ref}"; '
        "give that base, or insist with --allow-other-base"
    )
