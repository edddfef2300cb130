"""The preflight of a merge: everything that headers and metadata tell, compared before any tensor is read."""

import dataclasses
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from deltafl.checkpoints import layout as layouts
from deltafl.checkpoints.align import Alignment, align
from deltafl.checkpoints.layout import SIZES, Layout
from deltafl.errors import DeltaflError
from deltafl.rules.rule import Rule, Source, build_rule, check_rule, core_of


@dataclass(frozen=True)
class Model:
    """One fine-tuned model: path or hub id, and what the user says of it beyond its training.json."""

    ref: str
    name: str
    num_steps: int | None = None
    num_examples: int | None = None


@dataclass(frozen=True)
class MergeSpec:
    """Everything that decides a merge. Give `server_lr` or `scaling_coef`; with neither, server_lr is 1 (the mean).

    weights: one number for each model, None: equal; weight_patterns: (glob on tensor names, numbers), first match
    wins; scale_patterns: (glob, number) that goes before server_lr or scaling_coef. dtype: safetensors' spelling of
    the output's, None: the base's. exact: float64 and one correct rounding.
    """

    base: str
    models: tuple[Model, ...]
    method: str
    params: Mapping[str, Any] = field(default_factory=dict)
    server_lr: float | None = None
    scaling_coef: float | None = None
    weights: tuple[float, ...] | None = None
    weight_patterns: tuple[tuple[str, tuple[float, ...]], ...] = ()
    scale_patterns: tuple[tuple[str, float], ...] = ()
    scope: str = ""
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    dtype: str | None = None
    device: str = "cpu"
    exact: bool = False
    threads: int = 0
    max_shard_size: int = 5_000_000_000
    full_hash: bool = False
    allow_other_base: bool = False


@dataclass(frozen=True)
class Plan:
    """A merge that has passed the preflight. `num_elements`: of one delta; `passes`: over all inputs."""

    spec: MergeSpec
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


def plan_merge(spec: MergeSpec) -> Plan:
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

    rule = attempt(lambda: build_rule(spec.method, spec.params))
    base = attempt(lambda: layouts.read_layout(spec.base))
    found = {m.name: attempt(lambda m=m: layouts.read_layout(m.ref)) for m in spec.models}
    entries = {
        label: attempt(lambda x=x: entries_in(x)) for label, x in {"": base, **found}.items() if x
    }
    if not spec.models:
        problems.append("no models to merge; name them with --models")
    if spec.server_lr is not None and spec.scaling_coef is not None:
        problems.append(
            "--server-lr and --scaling-coef are two ways to say one thing; give one of them"
        )
    scales = [("--server-lr", spec.server_lr), ("--scaling-coef", spec.scaling_coef)]
    for option, scale in [
        *scales,
        *((f'scale of "{pattern}"', x) for pattern, x in spec.scale_patterns),
    ]:
        if scale is not None and not math.isfinite(scale):
            problems.append(f"{option}: {scale} is not a finite number")
    sources, notes = [], []
    for model in spec.models:
        layout = found[model.name]
        trained = attempt(lambda layout=layout: read_training(layout)) if layout else {}
        sources.append(source_of(model, trained or {}))
        if layout and base and trained:
            warning = other_base(model.name, trained, base)
            (notes if spec.allow_other_base else problems).extend([warning] if warning else [])
    if rule and sources:
        attempt(lambda: check_rule(rule, sources))
    problems += check_weights(spec)
    if base is None or entries[""] is None:
        raise DeltaflError(*problems)
    alignment = align(
        entries[""],
        {name: entries[name] for name in found if entries.get(name) is not None},
        scope=spec.scope,
        include=spec.include,
        exclude=spec.exclude,
    )
    problems += alignment.problems
    problems += [
        f'{what} of "{pattern}": the pattern matches no merged tensor'
        for what, patterns in (("weights", spec.weight_patterns), ("scale", spec.scale_patterns))
        for pattern, _ in patterns
        if alignment.merged and not any(fnmatchcase(name, pattern) for name in alignment.merged)
    ]
    if problems:
        raise DeltaflError(*problems)
    return _plan(
        spec, rule, base, found, entries[""], alignment, tuple(sources), [*alignment.notes, *notes]
    )


def _plan(
    spec: MergeSpec,
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
    width = SIZES.get(spec.dtype or "", 0)
    written = sum(
        e.numel * (width if width and e.floating else SIZES[e.dtype]) for e in entries.values()
    )
    threads = spec.threads or min(8, os.cpu_count() or 1)
    block = (8 if spec.exact else 4) << 18
    return Plan(
        spec=spec,
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


def source_of(model: Model, trained: Mapping[str, Any]) -> Source:
    """The Source of a model: what the user says goes before what training.json says."""
    known = {f.name: trained.get(f.name) for f in dataclasses.fields(Source) if f.name != "name"}
    for key in ("num_steps", "num_examples"):
        if getattr(model, key) is not None:
            known[key] = getattr(model, key)
    return Source(model.name, **known)


def other_base(name: str, trained: Mapping[str, Any], base: Layout) -> str | None:
    """A line if training.json records a base with another fingerprint than this one."""
    recorded = trained.get("base") or {}
    if not recorded.get("fingerprint") or recorded["fingerprint"] == layouts.fingerprint(base):
        return None
    return (
        f'model "{name}": was fine-tuned from another base ("{recorded.get("id", "unknown")}") than "{base.ref}"; '
        "give that base, or insist with --allow-other-base"
    )


def check_weights(spec: MergeSpec) -> list[str]:
    """Problems with the number of weights."""
    rows = [("--weights", spec.weights)] if spec.weights is not None else []
    rows += [(f'weights of "{pattern}"', row) for pattern, row in spec.weight_patterns]
    problems = [
        f"{where}: {len(row)} weights for {len(spec.models)} models"
        for where, row in rows
        if len(row) != len(spec.models)
    ]
    for where, row in rows:
        if not all(map(math.isfinite, row)):
            problems.append(f"{where}: {list(row)} holds a number that is not finite")
    if spec.weights is not None and not any(any(row) for _, row in rows):
        problems.append("--weights: all are 0; at least one model must count")
    return problems
