"""Which tensors of several models are merged: towers, heads, tied weights, what does not fit.

Works on names, dtypes and shapes alone, so that every problem of every model is known before
anything is read.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import filter as matching
from typing import TypeAlias

from deltafl.checkpoints.layout import Entry
from deltafl.checkpoints.naming import canonical, match
from deltafl.errors import DeltaflError, shorten

HEADS = frozenset(
    (
        "classifier",
        "cls",
        "fc",
        "head",
        "heads",
        "lm_head",
        "logit_bias",
        "logit_scale",
        "pooler",
        "predictions",
        "qa_outputs",
        "score",
        "text_projection",
        "visual_projection",
    )
)
TOWERS = frozenset(
    ("language_model", "multi_modal_projector", "text_model", "vision_model", "vision_tower")
)
PARTS = HEADS | TOWERS
"""First parts of names that a model may lack, or have beside what is merged."""

TIED = {
    "lm_head.weight": ("model.embed_tokens.weight", "transformer.wte.weight", "shared.weight"),
    "encoder.embed_tokens.weight": ("shared.weight",),
    "decoder.embed_tokens.weight": ("shared.weight",),
}
"""Tensor -> the twins, in the same model, that it may share its values with."""

COMPUTED = re.compile(r".*\b(inv_freq|(cos|sin)_cached|(attn|attention)\.(masked_bias|bias))")
"""Buffers that a model computes when it is made, which some versions of transformers saved: the
tables of rotary embeddings, and masks of attention, which unlike a bias have not one dimension.
"""

BUFFER, LEFT_OUT = "computed, not trained", "left out by --include/--exclude"

ZERO = (
    "no elements here, or in the base: a part that ZeRO-3 wrote without gathering it; make whole "
    "weights with DeepSpeed's zero_to_fp32.py"
)
LACKS = "of the base; leave out with --exclude if that is meant"

QUANTISED = ("weight", "qweight")
"""Last parts of names that hold numbers to compute with: integers there are a code for them."""

Entries: TypeAlias = Mapping[str, Entry]
Reasons: TypeAlias = dict[str, str]
"""Name of a tensor -> why it is not merged."""


@dataclass
class Alignment:
    """The outcome: what is merged, under which name each model holds it, what is not and why.

    dtype: of the result, None: the base's. merged: names of the base, in its order. names: model ->
    base name -> the model's name. copied: reason -> names copied from the base. ignored: model ->
    reason -> names of the model that are not used. tied: model, or "" for the base -> name -> twin:
    its tensors that must hold the same values. notes: what a user should know. problems: what stops
    the merge.
    """

    dtype: str | None = None
    merged: tuple[str, ...] = ()
    names: dict[str, dict[str, str]] = field(default_factory=dict)
    copied: dict[str, list[str]] = field(default_factory=dict)
    ignored: dict[str, dict[str, list[str]]] = field(default_factory=dict)
    tied: dict[str, dict[str, str]] = field(default_factory=lambda: {"": {}})
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def align(
    base: Entries,
    models: Mapping[str, Entries],
    *,
    scope: str = "",
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    adapters: Collection[str] = (),
    dtype: str | None = None,
) -> Alignment:
    """Compare all names, shapes and dtypes of all models with the base; decide what is merged.

    scope: prefix of base names. include, exclude: globs on base names, of exclude also on a model's
    own. A part that is a head or a tower (HEADS, TOWERS) and absent from a model, and a head of
    another shape, is copied from the base; any other difference is a problem. Nothing is raised:
    problems are collected. adapters: models of which only the weights that they change are given;
    what none changes is copied. dtype: of the result, if not the base's, in safetensors' spelling.
    """
    out, copied = Alignment(dtype), Reasons()
    prefix = scope and scope.removesuffix(".") + "."
    nothing = f"matches no tensor of the base; the first are {shorten(list(base))}"
    if base and not any(name.startswith(prefix) for name in base):
        return Alignment(problems=[f'--scope "{scope}" {nothing}'])
    found = {pattern: matching(base, pattern) for pattern in (*include, *exclude)}
    chosen, dropped = ({n for p in some for n in found[p]} for some in (include, exclude))
    for name, entry in base.items():
        if not name.startswith(prefix):
            copied[name] = f"outside --scope {scope}"
        elif name in dropped or (include and name not in chosen):
            copied[name] = LEFT_OUT
        elif computed(name, entry):
            copied[name] = BUFFER
        elif not entry.floating:
            copied[name] = f"not a float tensor ({entry.dtype})"
    out.problems += _quantised({n: base[n] for n, why in copied.items() if why.startswith("not")})
    own = {m: {n for p in exclude for n in matching(held, p)} for m, held in models.items()}
    reached = {p for p in exclude for names in own.values() if matching(names, p)}
    unmatched = (p for p, names in found.items() if not names and p not in reached)
    out.problems += [f'pattern "{p}" {nothing}' for p in unmatched]
    wanted = [name for name in base if name not in copied]
    for label, model in models.items():
        try:
            partial = label in adapters
            lost, notes, problems = _add(
                out, label, base, model, prefix, wanted, own[label], partial
            )
        except DeltaflError as error:
            lost, notes, problems = Reasons(), [], [str(error)]
        copied = lost | copied
        out.notes += [f'model "{label}": {note}' for note in notes]
        out.problems += [f'model "{label}": {problem}' for problem in problems]
    if adapters and models.keys() <= {*adapters}:
        changed = {name for pairs in out.names.values() for name in pairs}
        copied = {n: "no adapter changes it" for n in wanted if n not in changed} | copied
    out.copied, out.merged = _by_reason(copied), tuple(n for n in wanted if n not in copied)
    if not out.merged and not out.problems:
        out.problems.append(
            "base and models have no float tensor in common; is this the right base?"
        )
    return out


def _quantised(base: Entries) -> list[str]:
    """A line for tensors, of those that are no floats, that are codes for numbers."""
    coded = [
        name
        for name, entry in base.items()
        if entry.dtype.startswith("F8") or name.rpartition(".")[2] in QUANTISED
    ]
    return [
        f"the base is quantised ({base[name].dtype}): {shorten(coded)}; "
        "merge models that are not, or copy these from the base with --exclude"
        for name in coded[:1]
    ]


def _by_reason(reasons: Reasons) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name in reasons:
        found.setdefault(reasons[name], []).append(name)
    return found


def computed(name: str, entry: Entry) -> bool:
    """Whether it is a buffer that no training changes."""
    return bool(COMPUTED.fullmatch(name)) and (len(entry.shape) != 1 or "bias" not in name)


def part_of(name: str, prefix: str) -> str:
    """The first component of a name beyond the shared prefix: perhaps a head or a tower."""
    first = name.split(".")[0]
    return first if first in PARTS else name.removeprefix(prefix).split(".")[0]


def _add(
    out: Alignment,
    label: str,
    base: Entries,
    model: Entries,
    prefix: str,
    wanted: Sequence[str],
    excluded: Collection[str],
    partial: bool,
) -> tuple[Reasons, list[str], list[str]]:
    """Pair a model's tensors with the base's; what it wants copied from the base, notes, problems.
    One that is partial may hold few.

    Raises:
        DeltaflError: several pairings are equally good.
    """
    pairs, ours, theirs = match(base, model, prefix)
    out.names[label], out.tied[label], ignored, told = pairs, {}, Reasons(), []
    for name, twins in () if partial else TIED.items():
        twin = next((t for t in twins if t in model and t in base), "")
        if twin and name in wanted and name not in pairs:
            out.tied[""][name] = pairs[name] = twin
            told.append(f'"{name}" is tied to "{twin}"')
        elif twin and name in model and name not in base:
            ignored[name] = f"tied to {twin}"
            if twin in wanted:
                out.tied[label][name] = twin
    left_out = {name: LEFT_OUT for name in wanted if pairs.get(name) in excluded}
    kept = (name for name in wanted if name not in left_out)
    compared = [name for name in kept if name in pairs or not partial]
    copied, notes, problems = _differences(out, base, model, pairs, ours, compared)
    known, extra, used = {canonical(name) for name in base}, [], {*pairs.values(), *ignored}
    for name in (name for name in model if name not in used):
        part = part_of(name, theirs)
        if name.startswith(theirs) and ours + canonical(name)[len(theirs) :] in known:
            ignored[name] = "outside --scope"
        elif name in excluded:
            ignored[name] = LEFT_OUT
        elif computed(name, model[name]):
            ignored[name] = BUFFER
        elif part in PARTS and not partial:
            ignored[name] = f"{part}: not in the base"
        elif not model[name].floating:
            ignored[name] = "not a float tensor"
        else:
            extra.append(name)
    if extra:
        problems.append(
            f"has {shorten(extra)}, which the base lacks; was it fine-tuned from another base? "
            "Leave them out with --exclude if not"
        )
    if ignored:
        out.ignored[label] = _by_reason(ignored)
    return left_out | copied, told if partial else told + notes, problems


def _differences(
    out: Alignment,
    base: Entries,
    model: Entries,
    pairs: Mapping[str, str],
    ours: str,
    wanted: Sequence[str],
) -> tuple[Reasons, list[str], list[str]]:
    """What of the base a model lacks or holds in another form, as `_add` returns it."""
    parts = {name: part_of(name, ours) for name in wanted}
    foreign = PARTS - {part_of(name, ours) for name in pairs}
    copied, missing, empty, problems = Reasons(), [], [], []
    vocabularies = defaultdict[tuple[int, int], list[str]](list)
    dtypes, coded = Counter[tuple[str, str]](), defaultdict[tuple[str, str], list[str]](list)
    for name, part in parts.items():
        if name not in pairs and part in foreign:
            copied[name] = f"{part}: not in every model"
            continue
        if name not in pairs:
            missing.append(name)
            continue
        want, held = base[name], model[pairs[name]]
        if not held.floating:
            coded[held.dtype, want.dtype].append(pairs[name])
        elif want.shape == held.shape:
            dtypes[held.dtype, want.dtype] += 1
        elif (0,) in (want.shape, held.shape):
            empty.append(pairs[name])
        elif part in HEADS and part != "lm_head":
            why = f"{part}: a head of another shape in a model"
            copied |= {sibling: why for sibling in wanted if parts[sibling] == part}
        elif len(want.shape) == 2 and held.shape[1:] == want.shape[1:]:
            vocabularies[held.shape[0], want.shape[0]].append(pairs[name])
        else:
            problems.append(
                f'tensor "{pairs[name]}" is {held.shape}, the base has {want.shape}; '
                "was it fine-tuned from another base?"
            )
    problems += [
        f"{shorten(names)}: {rows} rows, the base has {want}; another vocabulary? Find "
        "rows by token with --vocabulary union (or base), or copy them from the base with "
        "--exclude"
        for (rows, want), names in vocabularies.items()
    ]
    if len(problems) > 6:
        problems[5:] = [f"{len(problems) - 5} more tensors have another shape than in the base"]
    problems += [
        f"{dtype} where the base has {want}: {shorten(names)}; merge models that are not quantised"
        for (dtype, want), names in coded.items()
    ]
    problems += [f"{shorten(names)}: {ZERO}" for names in (empty,) if names]
    problems += [f"lacks {shorten(names)} {LACKS}" for names in (missing,) if names]
    notes = [
        f"{count} tensors are {dtype}, the base is {want}: the result is {out.dtype or want}"
        for (dtype, want), count in dtypes.items()
        if dtype != want
    ]
    return copied, notes, problems
