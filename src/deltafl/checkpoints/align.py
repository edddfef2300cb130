"""Which tensors of several models are merged: towers inside models, heads, tied weights, and what does not fit.

Works on names, dtypes and shapes alone, so that every problem of every model is known before anything is read.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Protocol

from deltafl.checkpoints.naming import canonical, match
from deltafl.errors import DeltaflError, shorten

HEADS = frozenset((
    "classifier", "cls", "fc", "head", "heads", "lm_head", "logit_bias", "logit_scale", "pooler", "predictions",
    "qa_outputs", "score", "text_projection", "visual_projection",
))  # fmt: skip
TOWERS = frozenset(
    ("language_model", "multi_modal_projector", "text_model", "vision_model", "vision_tower")
)
TIED = {
    "lm_head.weight": ("model.embed_tokens.weight", "transformer.wte.weight", "shared.weight"),
    "encoder.embed_tokens.weight": ("shared.weight",),
    "decoder.embed_tokens.weight": ("shared.weight",),
}
"""Tensor -> the twins, in the same model, that it may share its values with."""

QUANTISED = frozenset(("weight", "qweight"))
"""Last parts of names that hold numbers to compute with: integers there are a code for them."""


class Entry(Protocol):
    """What is known of a tensor without reading it. `floating`: a float type that arithmetic is defined on."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> str: ...

    @property
    def floating(self) -> bool: ...


@dataclass
class Alignment:
    """The outcome: what is merged, under which name each model holds it, and what is not merged and why.

    merged: names of the base, in its order. names: model -> base name -> the model's name. copied: reason -> names
    copied from the base. ignored: model -> reason -> names of the model that are not used. tied: model, or "" for the
    base -> (name, twin) pairs of its tensors that must hold the same values. notes: what a user should know.
    problems: what stops the merge.
    """

    merged: tuple[str, ...] = ()
    names: dict[str, dict[str, str]] = field(default_factory=dict)
    copied: dict[str, list[str]] = field(default_factory=dict)
    ignored: dict[str, dict[str, list[str]]] = field(default_factory=dict)
    tied: dict[str, list[tuple[str, str]]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def align(
    base: Mapping[str, Entry],
    models: Mapping[str, Mapping[str, Entry]],
    *,
    scope: str = "",
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
) -> Alignment:
    """Compare all names, shapes and dtypes of all models with the base and decide what is merged.

    scope: prefix of base names. include, exclude: globs on base names. A part that is a head or a tower (HEADS,
    TOWERS) and absent from a model, and a head of another shape, is copied from the base; any other difference is a
    problem. Nothing is raised: problems are collected.
    """
    out = Alignment()
    prefix = scope if not scope or scope.endswith(".") else scope + "."
    if not any(name.startswith(prefix) for name in base) and base:
        out.problems.append(
            f'--scope "{scope}" matches no tensor of the base; the first are {shorten(list(base))}'
        )
        return out
    wanted, coded = [], []
    for name, entry in base.items():
        if not name.startswith(prefix):
            out.copied.setdefault(f"outside --scope {scope}", []).append(name)
        elif (include and not _any(name, include)) or _any(name, exclude):
            out.copied.setdefault("left out by --include/--exclude", []).append(name)
        elif not entry.floating:
            out.copied.setdefault(f"not a float tensor ({entry.dtype})", []).append(name)
            coded += (
                [name]
                if entry.dtype.startswith("F8") or name.rpartition(".")[2] in QUANTISED
                else []
            )
        else:
            wanted.append(name)
    if coded:
        out.problems.append(
            f"the base: {_count(coded)} quantised ({base[coded[0]].dtype}): {shorten(coded)}; "
            "merge models that are not, or copy these from the base with --exclude"
        )
    for pattern in (*include, *exclude):
        if not any(fnmatchcase(n, pattern) for n in base):
            out.problems.append(
                f'pattern "{pattern}" matches no tensor of the base; the first are {shorten(list(base))}'
            )
    outside: dict[str, str] = {}
    for label, model in models.items():
        try:
            pairs, ours, theirs = match(base, model, prefix)
        except DeltaflError as error:
            out.problems.append(f'model "{label}": {error}')
            continue
        _tie(label, base, model, pairs, wanted, out)
        out.names[label] = pairs
        _compare(label, base, model, pairs, ours, wanted, outside, out)
        _extras(label, base, model, pairs, ours, theirs, out)
    for name, reason in outside.items():
        out.copied.setdefault(reason, []).append(name)
    out.merged = tuple(n for n in wanted if n not in outside)
    if not out.merged and not out.problems:
        out.problems.append(
            "base and models have no float tensor in common; is this the right base?"
        )
    return out


def _count(names: Sequence[str]) -> str:
    return "1 tensor is" if len(names) == 1 else f"{len(names)} tensors are"


def _any(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, p) for p in patterns)


def part_of(name: str, prefix: str = "") -> str:
    """The first component of a name that is not in the shared prefix: the head or tower that it may belong to."""
    first = name.split(".", 1)[0]
    if first in HEADS | TOWERS or not name.startswith(prefix):
        return first
    return name[len(prefix) :].split(".", 1)[0]


def _tie(
    label: str,
    base: Mapping[str, Entry],
    model: Mapping[str, Entry],
    pairs: dict[str, str],
    wanted: Sequence[str],
    out: Alignment,
) -> None:
    """Pair a tensor that only the base writes out with its twin, and note which tensors must equal their twins."""
    for name, twins in TIED.items():
        twin = next((t for t in twins if t in model and t in base), None)
        if twin is None:
            continue
        if name in wanted and name not in pairs:
            pairs[name] = twin
            if (name, twin) not in out.tied.setdefault("", []):
                out.tied[""].append((name, twin))
            out.notes.append(f'model "{label}": "{name}" is tied to "{twin}"')
        elif name in model and name not in base and twin in wanted:
            out.tied.setdefault(label, []).append((name, twin))
        elif name in model and name not in base:
            out.ignored.setdefault(label, {}).setdefault(f"tied to {twin}", []).append(name)


def _compare(
    label: str,
    base: Mapping[str, Entry],
    model: Mapping[str, Entry],
    pairs: Mapping[str, str],
    ours: str,
    wanted: Sequence[str],
    outside: dict[str, str],
    out: Alignment,
) -> None:
    """What of the base this model lacks or holds in another form."""
    present = {part_of(n, ours) for n in pairs}
    missing, shapes, dtypes = [], [], Counter()
    odd: dict[tuple[str, str], list[str]] = {}
    for name in wanted:
        part = part_of(name, ours)
        if name not in pairs:
            if part in HEADS | TOWERS and part not in present:
                outside.setdefault(name, f"{part}: not in every model")
            else:
                missing.append(name)
            continue
        a, b = base[name], model[pairs[name]]
        if not b.floating:
            odd.setdefault((b.dtype, a.dtype), []).append(pairs[name])
        elif a.shape != b.shape and part in HEADS and part != "lm_head":
            for sibling in wanted:
                if part_of(sibling, ours) == part:
                    outside.setdefault(sibling, f"{part}: a head of another shape in a model")
        elif a.shape != b.shape:
            why = (
                "another vocabulary?"
                if a.shape[1:] == b.shape[1:]
                else "was it fine-tuned from another base?"
            )
            shapes.append(
                f'model "{label}": tensor "{pairs[name]}" is {b.shape}, the base has {a.shape}; {why}'
            )
        elif a.dtype != b.dtype:
            dtypes[b.dtype, a.dtype] += 1
    out.problems += shapes if len(shapes) <= 6 else shapes[:5]
    if len(shapes) > 6:
        out.problems.append(
            f'model "{label}": {len(shapes) - 5} more tensors have another shape than in the base'
        )
    for (theirs, want), names in odd.items():
        out.problems.append(
            f'model "{label}": {_count(names)} {theirs}, in the base {want}: {shorten(names)}; '
            "merge models that are not quantised"
        )
    if missing:
        out.problems.append(
            f'model "{label}": lacks {len(missing)} tensor{"s" * (len(missing) > 1)} of the base: {shorten(missing)}; '
            "leave them out with --exclude if that is meant"
        )
    for (theirs, want), count in dtypes.items():
        out.notes.append(
            f'model "{label}": {count} tensors are {theirs}, the base is {want}: the result is {want}'
        )


def _extras(
    label: str,
    base: Mapping[str, Entry],
    model: Mapping[str, Entry],
    pairs: Mapping[str, str],
    ours: str,
    theirs: str,
    out: Alignment,
) -> None:
    """What this model has and the base has not, or has outside the scope."""
    seen = {n for names in out.ignored.get(label, {}).values() for n in names}
    used = {*pairs.values(), *(name for name, _ in out.tied.get(label, ())), *seen}
    known = {canonical(name) for name in base}
    extra = []
    for name, entry in model.items():
        if name in used:
            continue
        part = part_of(name, theirs)
        if name.startswith(theirs) and ours + canonical(name)[len(theirs) :] in known:
            out.ignored.setdefault(label, {}).setdefault("outside --scope", []).append(name)
        elif part in HEADS | TOWERS:
            out.ignored.setdefault(label, {}).setdefault(f"{part}: not in the base", []).append(
                name
            )
        elif not entry.floating:
            out.ignored.setdefault(label, {}).setdefault("not a float tensor", []).append(name)
        else:
            extra.append(name)
    if extra:
        out.problems.append(
            f'model "{label}": has {len(extra)} tensor{"s" * (len(extra) > 1)} that the base lacks: {shorten(extra)}; '
            "was it fine-tuned from another base?"
        )
