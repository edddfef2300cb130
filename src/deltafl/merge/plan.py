"""The preflight of a merge: everything that headers and metadata tell, compared before any tensor is read."""

import dataclasses
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from deltafl.checkpoints import layout as layouts
from deltafl.checkpoints.align import Alignment, align
from deltafl.checkpoints.layout import SIZES, Layout
from deltafl.errors import DeltaflError
from deltafl.merge.recipe import MergeRecipe, ModelEntry
from deltafl.rules.rule import Rule, Source, build_rule, check_rule, core_of


@dataclass(frozen=True)
class Plan:
    """A merge that has passed the preflight. `num_elements`: of one delta; `passes`: over all inputs."""

    recipe: MergeRecipe
    rule: Rule
    base: Layout
    layouts: Mapping[str, Layout]
    alignment: Alignment
    sources: tuple[Source, ...]
    num_elements: int
    passes: int
    bytes_read: int
    bytes_written: int
    working_memory: int
    threads: int
    notes: tuple[str, ...]

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
    """The preflight: names, shapes and dtypes of all models against the base, and the rule against what is known.

    Reads headers only; torch is imported only for torch state dicts. Raises DeltaflError with every problem at once.
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
    notes = [*alignment.notes, *notes]
    return _plan(recipe, rule, base, found, entries[""], alignment, tuple(sources), notes)


def _plan(
    recipe: MergeRecipe,
    rule: Rule,
    base: Layout,
    found: Mapping[str, Layout],
    entries: Mapping[str, Any],
    alignment: Alignment,
    sources: tuple[Source, ...],
    notes: Sequence[str],
) -> Plan:
    num_elements = sum(entries[n].numel for n in alignment.merged)
    passes = (
        1
        + sum(t.density is not None for t in rule.transforms)
        + bool(getattr(core_of(rule), "needs_gram", False))
    )
    width = SIZES.get(recipe.stored_dtype or "", 0)
    written = sum(
        e.numel * (width if width and e.floating else SIZES[e.dtype]) for e in entries.values()
    )
    threads = recipe.threads or min(8, os.cpu_count() or 1)
    block = (8 if recipe.exact else 4) << 18
    return Plan(
        recipe=recipe,
        rule=rule,
        base=base,
        layouts=found,
        alignment=alignment,
        sources=sources,
        num_elements=num_elements,
        passes=passes,
        bytes_read=passes * (base.num_bytes + sum(x.num_bytes for x in found.values())),
        bytes_written=written,
        working_memory=threads * block * (2 * len(found) + 6),
        threads=threads,
        notes=tuple(notes),
    )


def entries_in(layout: Layout) -> Mapping[str, Any]:
    """Name -> entry of every tensor; a torch state dict is opened for it."""
    if not layout.pickled:
        return layout.entries
    from deltafl.checkpoints.checkpoint import entries_of, open_tensors

    return entries_of(open_tensors(layout))


def read_training(layout: Layout) -> dict[str, Any]:
    """What training.json beside the weights says; {} if there is none. Raises DeltaflError if it cannot be read."""
    file = layout.folder / "training.json"
    if not file.is_file():
        return {}
    try:
        held = json.loads(file.read_text())
    except ValueError:
        raise DeltaflError(f'"{file}": is not valid JSON; mend or remove it') from None
    if not isinstance(held, dict):
        raise DeltaflError(f'"{file}": is not a JSON object; mend or remove it')
    wrong = [
        f'"{file}": {key} is {value!r}; it must be {wanted}; mend or remove it'
        for key, (kind, wanted) in _KINDS.items()
        if (value := held.get(key)) is not None
        and (isinstance(value, bool) or not isinstance(value, kind))
    ]
    if wrong:
        raise DeltaflError(*wrong)
    return held


_KINDS: dict[str, tuple[Any, str]] = {
    **dict.fromkeys(("num_examples", "num_steps", "seed"), (int, "a whole number")),
    **dict.fromkeys(("lr", "momentum", "prox_mu"), ((int, float), "a number")),
    "base": (dict, "an object"),
}


def source_of(name: str, model: ModelEntry, trained: Mapping[str, Any]) -> Source:
    """The Source of a model: what the user says goes before what training.json says."""
    known = {f.name: trained.get(f.name) for f in dataclasses.fields(Source) if f.name != "name"}
    told = {"num_steps": model.num_steps, "num_examples": model.num_examples}
    known |= {key: value for key, value in told.items() if value is not None}
    return Source(name, **known)


def other_base(name: str, trained: Mapping[str, Any], base: Layout) -> str | None:
    """A line if training.json records a base with another fingerprint than this one."""
    recorded = trained.get("base") or {}
    if not recorded.get("fingerprint") or recorded["fingerprint"] == layouts.fingerprint(base):
        return None
    return (
        f'model "{name}": was fine-tuned from another base ("{recorded.get("id", "unknown")}") than "{base.ref}"; '
        "give that base, or insist with --allow-other-base"
    )
