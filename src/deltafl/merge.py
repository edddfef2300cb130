"""One-shot merging: read, compare everything, take one server step, write, record."""

import dataclasses
import json
import math
import os
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deltafl import layout as layouts
from deltafl.align import Alignment, align
from deltafl.errors import DeltaflError
from deltafl.files import atomic_folder, check_output
from deltafl.layout import SIZES, Layout
from deltafl.rules import Rule, Source, build_rule, check_rule, core_of
from deltafl.version import __version__

if TYPE_CHECKING:
    import torch

    from deltafl.aggregation import Aggregate, Update, Weights
    from deltafl.tensors import Tensors


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
    wins. dtype: safetensors' spelling of the output's, None: the base's. exact: float64 and one correct rounding.
    """

    base: str
    models: tuple[Model, ...]
    method: str
    params: Mapping[str, Any] = field(default_factory=dict)
    server_lr: float | None = None
    scaling_coef: float | None = None
    weights: tuple[float, ...] | None = None
    weight_patterns: tuple[tuple[str, tuple[float, ...]], ...] = ()
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
    entries = {label: attempt(lambda x=x: _entries(x)) for label, x in {"": base, **found}.items() if x}
    if not spec.models:
        problems.append("no models to merge; name them with --models")
    if spec.server_lr is not None and spec.scaling_coef is not None:
        problems.append("--server-lr and --scaling-coef are two ways to say one thing; give one of them")
    for option, scale in (("--server-lr", spec.server_lr), ("--scaling-coef", spec.scaling_coef)):
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
    if problems:
        raise DeltaflError(*problems)
    return _plan(spec, rule, base, found, entries[""], alignment, tuple(sources), [*alignment.notes, *notes])


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
    passes = 1 + sum(t.density is not None for t in rule.transforms) + bool(getattr(core_of(rule), "needs_gram", False))
    width = SIZES.get(spec.dtype or "", 0)
    written = sum(e.numel * (width if width and e.floating else SIZES[e.dtype]) for e in entries.values())
    threads = spec.threads or min(8, os.cpu_count() or 1)
    block = (8 if spec.exact else 4) << 16
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


def _entries(layout: Layout) -> Mapping[str, Any]:
    if not layout.pickled:
        return layout.entries
    from deltafl.checkpoint import entries_of, open_tensors

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
        if (value := held.get(key)) is not None and (isinstance(value, bool) or not isinstance(value, kind))
    ]
    if wrong:
        raise DeltaflError(*wrong)
    return held


_KINDS: dict[str, tuple[Any, str]] = {
    **dict.fromkeys(("num_examples", "num_steps"), (int, "a whole number")),
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


@dataclass(frozen=True)
class Opened:
    """The lazy mappings of a merge: base, models and deltas, and the base's blocks in the precision `dtype`."""

    base: "Tensors"
    working: "Tensors"
    dtype: "torch.dtype"
    updates: "tuple[Update, ...]"
    weights: "Weights"
    tuned: "Mapping[str, Tensors]"


@contextmanager
def open_updates(plan: Plan, memory: int = 0) -> Iterator[Opened]:
    """Open all checkpoints of a plan; read them into memory if they fit into `memory` bytes together.

    Raises DeltaflError if a tied tensor does not equal its twin.
    """
    import torch

    from deltafl.aggregation import Update, Weights, as_weights
    from deltafl.checkpoint import Checkpoint, Difference, Latest, open_tensors

    spec, dtype = plan.spec, torch.float64 if plan.spec.exact else torch.float32
    if spec.device != "cpu" and not torch.cuda.is_available():
        raise DeltaflError(f"--device {spec.device}: torch finds no GPU here; use --device cpu")
    base: Tensors = open_tensors(plan.base)
    tuned: dict[str, Tensors] = {name: open_tensors(layout) for name, layout in plan.layouts.items()}
    if plan.base.num_bytes + sum(layout.num_bytes for layout in plan.layouts.values()) <= memory:
        base, tuned = dict(base), {name: dict(tensors) for name, tensors in tuned.items()}
    try:
        refuse_untied(plan.alignment, base, tuned)
        working = Latest(base, dtype, spec.device)
        updates = tuple(
            Update(
                Difference(
                    working, tuned[s.name], {n: plan.alignment.names[s.name][n] for n in plan.alignment.merged}, dtype
                ),
                s,
            )
            for s in plan.sources
        )
        default = as_weights(spec.weights, len(updates)).default
        yield Opened(
            base, working, dtype, updates, as_weights(Weights(default, spec.weight_patterns), len(updates)), tuned
        )
    finally:
        for tensors in (base, *tuned.values()):
            if isinstance(tensors, Checkpoint):
                tensors.close()


def refuse_untied(alignment: Alignment, base: "Tensors", tuned: "Mapping[str, Tensors]") -> None:
    """Raise DeltaflError for tensors that the naming layer took for twins and that hold different values."""
    problems = []
    for label, pairs in alignment.tied.items():
        for name, twin in pairs:
            if _equal(tuned[label] if label else base, name, twin):
                continue
            here = f'model "{label}": "{name}" differs from "{twin}", but in the base the two are one'
            there = f'the base: "{name}" differs from "{twin}", but in a model the two are one'
            remedy = f'merge into a base that is not tied, or copy "{twin}" from the base with --exclude'
            problems.append(f"{here}; {remedy}" if label else f'{there}; copy "{name}" from the base with --exclude')
    if problems:
        raise DeltaflError(*problems)


def _equal(tensors: "Tensors", a: str, b: str) -> bool:
    """Whether two tensors hold the same values; read by blocks."""
    import torch

    from deltafl.tensors import block_of, blocks, shape_of

    shape = shape_of(tensors, a)
    return shape == shape_of(tensors, b) and all(
        torch.equal(block_of(tensors, a, *span), block_of(tensors, b, *span)) for span in blocks(math.prod(shape))
    )


def large_deltas(opened: Opened, limit: float = 0.5) -> list[str]:
    """A warning for each model whose delta is about as large as the base, judged from a sample of the tensors."""
    from deltafl.tensors import block_of, shape_of

    names = list(opened.updates[0].delta)
    warnings = []
    for update in opened.updates:
        delta = base = 0.0
        for name in names[:: max(1, len(names) // 64)]:
            stop = 1
            for n in shape_of(update.delta, name):
                stop *= n
            stop = min(stop, 4096)
            delta += float(block_of(update.delta, name, 0, stop).double().square().sum())
            base += float(block_of(opened.working, name, 0, stop).double().square().sum())
        if base and (delta / base) ** 0.5 >= limit:
            warnings.append(
                f'model "{update.source.name}": its delta is {(delta / base) ** 0.5:.2g} times as large as the base; '
                "is it a fine-tune of this base?"
            )
    return warnings


def step_scale(spec: MergeSpec, weights: "Weights") -> float | Callable[[str], float]:
    """What multiplies the mean-scale update: server_lr, by default 1, or lambda's equivalent."""
    from deltafl.aggregation import sum_scale

    if spec.scaling_coef is not None:
        return sum_scale(weights, spec.scaling_coef)
    return 1.0 if spec.server_lr is None else spec.server_lr


def run_merge(
    plan: Plan,
    out: str | Path,
    *,
    overwrite: bool = False,
    on_elements: Callable[[int], None] = lambda count: None,
) -> dict[str, Any]:
    """Merge and write the directory `out`, whole or not at all; returns what deltafl.json records.

    on_elements: told how many delta elements more have been visited, of `num_elements * n * passes`.

    Raises:
        DeltaflError: bad input that only shows while reading (NaN, a file that changed); `out` exists.
        OSError: the disk is full, or fails.
    """
    from deltafl.aggregation import Aggregate, Stepped
    from deltafl.checkpoint import DTYPES, entries_of
    from deltafl.writing import copy_companions, plan_shards, write_tensors

    spec = plan.spec
    refuse_inputs_as_output(plan, Path(out))
    with atomic_folder(out, overwrite=overwrite) as folder, open_updates(plan) as opened:
        warnings = large_deltas(opened)
        aggregate = Aggregate(
            plan.rule,
            opened.updates,
            opened.weights,
            dtype=opened.dtype,
            threads=plan.threads,
            on_elements=on_elements,
        )
        dtype = DTYPES[spec.dtype] if spec.dtype else None
        scale = step_scale(spec, opened.weights)
        stepped = Stepped(opened.base, aggregate, scale, dtype=dtype, working=opened.working)
        shards = plan_shards(entries_of(opened.base), spec.dtype, spec.max_shard_size)
        n = len(opened.updates)
        write_tensors(stepped, shards, folder, threads=plan.threads, on_elements=lambda count: on_elements(n * count))
        if (
            plan.base.folder.joinpath("config.json").exists()
            or plan.base.folder.joinpath("deltafl_model.json").exists()
        ):
            copy_companions(plan.base.folder, folder, spec.dtype)
        record = describe(plan, opened, aggregate, warnings)
        (folder / "deltafl.json").write_text(json.dumps(record, indent=2))
    return record


def refuse_inputs_as_output(plan: Plan, out: Path) -> None:
    """Raise DeltaflError if writing `out` would touch an input."""
    target = out.resolve()
    for layout in (plan.base, *plan.layouts.values()):
        source = layout.folder.resolve()
        if target == source or target in source.parents:
            raise DeltaflError(f'--out "{out}" is, or holds, the input "{layout.ref}"; choose another folder')


def describe(plan: Plan, opened: Opened, aggregate: "Aggregate", warnings: Sequence[str]) -> dict[str, Any]:
    """The record of a merge: inputs by identity, rule, parameters, both scales, what was left out, versions."""
    import torch

    spec, total = plan.spec, sum(map(abs, opened.weights.default))
    server_lr = (
        (1.0 if spec.server_lr is None else spec.server_lr) if spec.scaling_coef is None else total * spec.scaling_coef
    )
    return {
        "deltafl": __version__,
        "base": layouts.identity(plan.base, full_hash=spec.full_hash),
        "models": [
            {**layouts.identity(plan.layouts[s.name], full_hash=spec.full_hash), "source": dataclasses.asdict(s)}
            for s in plan.sources
        ],
        "method": spec.method,
        "params": dict(spec.params),
        "server_lr": server_lr,
        "scaling_coef": server_lr / total,
        "weights": list(opened.weights.default),
        "weight_patterns": [[pattern, list(row)] for pattern, row in opened.weights.patterns],
        "scope": spec.scope,
        "include": list(spec.include),
        "exclude": list(spec.exclude),
        "dtype": spec.dtype,
        "exact": spec.exact,
        "merged_tensors": len(plan.alignment.merged),
        "merged_elements": plan.num_elements,
        "copied": plan.alignment.copied,
        "ignored": plan.alignment.ignored,
        "notes": list(plan.notes),
        "warnings": list(warnings),
        **aggregate.report,
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }


__all__ = [
    "MergeSpec", "Model", "Opened", "Plan", "check_output", "open_updates", "plan_merge", "read_training", "run_merge",
]  # fmt: skip
