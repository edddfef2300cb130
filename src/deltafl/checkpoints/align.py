"""Which tensors of several models are merged: towers, heads, tied weights, what does not fit.

Works on names, dtypes and shapes alone, so that every problem of every model is known before
anything is read.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import TypeAlias

from deltafl.checkpoints.layout import Entry
from deltafl.checkpoints.naming import canonical, match
from deltafl.errors import DeltaflError, shorten

HEADS = frozenset((
    "classifier", "cls", "fc", "head", "heads", "lm_head", "logit_bias", "logit_scale", "pooler",
    "predictions", "qa_outputs", "score", "text_projection", "visual_projection",
))  # fmt: skip
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

QUANTISED = ("weight", "qweight")
"""Last parts of names that hold numbers to compute with: integers there are a code for them."""

Entries: TypeAlias = Mapping[str, Entry]


def _lists() -> defaultdict[str, list[str]]:
    return defaultdict(list)


@dataclass
class Alignment:
    """The outcome: what is merged, under which name each model holds it, what is not and why.

    merged: names of the base, in its order. names: model -> base name -> the model's name. copied:
    reason -> names copied from the base. ignored: model -> reason -> names of the model that are
    not used. tied: model, or "" for the base -> (name, twin) pairs of its tensors that must hold
    the same values. notes: what a user should know. problems: what stops the merge.
    """

    merged: tuple[str, ...] = ()
    names: dict[str, dict[str, str]] = field(default_factory=dict)
    copied: dict[str, list[str]] = field(default_factory=_lists)
    ignored: dict[str, dict[str, list[str]]] = field(default_factory=dict)
    tied: dict[str, list[tuple[str, str]]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def align(
    base: Entries,
    models: Mapping[str, Entries],
    *,
    scope: str = "",
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
) -> Alignment:
    """Compare all names, shapes and dtypes of all models with the base; decide what is merged.

    scope: prefix of base names. include, exclude: globs on base names. A part that is a head or a
    tower (HEADS, TOWERS) and absent from a model, and a head of another shape, is copied from the
    base; any other difference is a problem. Nothing is raised: problems are collected.
    """
    out = Alignment()
    prefix = scope if not scope or scope.endswith(".") else scope + "."
    if not any(name.startswith(prefix) for name in base) and base:
        first = shorten(list(base))
        out.problems.append(
            f'--scope "{scope}" matches no tensor of the base; the first are {first}'
        )
        return out
    wanted = []
    for name, entry in base.items():
        if not name.startswith(prefix):
            out.copied[f"outside --scope {scope}"].append(name)
        elif (include and not _any(name, include)) or _any(name, exclude):
            out.copied["left out by --include/--exclude"].append(name)
        elif not entry.floating:
            out.copied[f"not a float tensor ({entry.dtype})"].append(name)
        else:
            wanted.append(name)
    _refuse_quantised(base, out)
    for pattern in (*include, *exclude):
        if not any(fnmatchcase(n, pattern) for n in base):
            out.problems.append(
                f'pattern "{pattern}" matches no tensor of the base; '
                f"the first are {shorten(list(base))}"
            )
    outside: dict[str, str] = {}
    for label, entries in models.items():
        try:
            model = _Model(label, base, entries, prefix, wanted, out)
        except DeltaflError as error:
            out.problems.append(f'model "{label}": {error}')
            continue
        model.tie()
        outside = model.compare() | outside
        model.find_extras()
    for name, reason in outside.items():
        out.copied[reason].append(name)
    out.merged = tuple(n for n in wanted if n not in outside)
    if not out.merged and not out.problems:
        out.problems.append(
            "base and models have no float tensor in common; is this the right base?"
        )
    return out


def _refuse_quantised(base: Entries, out: Alignment) -> None:
    held = [n for why, names in out.copied.items() if why.startswith("not a float") for n in names]
    coded = [n for n in held if base[n].dtype.startswith("F8") or n.rpartition(".")[2] in QUANTISED]
    if coded:
        out.problems.append(
            f"the base: {_count(coded)} quantised ({base[coded[0]].dtype}): {shorten(coded)}; "
            "merge models that are not, or copy these from the base with --exclude"
        )


def _count(names: Sequence[str]) -> str:
    return "1 tensor is" if len(names) == 1 else f"{len(names)} tensors are"


def _any(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, p) for p in patterns)


def part_of(name: str, prefix: str = "") -> str:
    """The first component of a name beyond the shared prefix: perhaps a head or a tower."""
    first = name.split(".", 1)[0]
    if first in PARTS or not name.startswith(prefix):
        return first
    return name[len(prefix) :].split(".", 1)[0]


class _Model:
    """One model beside the base; what is found goes into `out`.

    pairs: base name -> the model's. ours, theirs: prefixes that only one of the two has.
    """

    def __init__(
        self,
        label: str,
        base: Entries,
        entries: Entries,
        prefix: str,
        wanted: Sequence[str],
        out: Alignment,
    ) -> None:
        self.label, self.base, self.entries, self.wanted, self.out = (
            label, base, entries, wanted, out,
        )  # fmt: skip
        self.pairs, self.ours, self.theirs = match(base, entries, prefix)
        out.names[label] = self.pairs

    def tie(self) -> None:
        """Pair a tensor that only the base writes out with its twin; note which must be equal."""
        out = self.out
        for name, twins in TIED.items():
            twin = next((t for t in twins if t in self.entries and t in self.base), None)
            if twin is None:
                continue
            if name in self.wanted and name not in self.pairs:
                self.pairs[name] = twin
                if (name, twin) not in out.tied.setdefault("", []):
                    out.tied[""].append((name, twin))
                out.notes.append(f'model "{self.label}": "{name}" is tied to "{twin}"')
            elif name in self.entries and name not in self.base:
                if twin in self.wanted:
                    out.tied.setdefault(self.label, []).append((name, twin))
                else:
                    self.ignore(f"tied to {twin}", name)

    def ignore(self, reason: str, name: str) -> None:
        self.out.ignored.setdefault(self.label, _lists())[reason].append(name)

    def compare(self) -> dict[str, str]:
        """Note what of the base this model lacks or holds in another form.

        Returns what is to be copied from the base for that: name -> reason.
        """
        present = {part_of(n, self.ours) for n in self.pairs}
        missing, shapes, outside = [], [], dict[str, str]()
        dtypes, coded = Counter(), defaultdict[tuple[str, str], list[str]](list)
        for name in self.wanted:
            part = part_of(name, self.ours)
            if name not in self.pairs:
                if part in PARTS and part not in present:
                    outside[name] = f"{part}: not in every model"
                else:
                    missing.append(name)
                continue
            a, b = self.base[name], self.entries[self.pairs[name]]
            if not b.floating:
                coded[b.dtype, a.dtype].append(self.pairs[name])
            elif a.shape != b.shape and part in HEADS and part != "lm_head":
                for sibling in self.wanted:
                    if part_of(sibling, self.ours) == part:
                        outside.setdefault(sibling, f"{part}: a head of another shape in a model")
            elif a.shape != b.shape:
                vocabulary = a.shape[1:] == b.shape[1:]
                why = (
                    "another vocabulary?" if vocabulary else "was it fine-tuned from another base?"
                )
                shapes.append(
                    f'tensor "{self.pairs[name]}" is {b.shape}, the base has {a.shape}; {why}'
                )
            elif a.dtype != b.dtype:
                dtypes[b.dtype, a.dtype] += 1
        if len(shapes) > 6:
            shapes[5:] = [f"{len(shapes) - 5} more tensors have another shape than in the base"]
        for (dtype, want), names in coded.items():
            shapes.append(
                f"{_count(names)} {dtype}, in the base {want}: {shorten(names)}; "
                "merge models that are not quantised"
            )
        if missing:
            shapes.append(
                f"lacks {len(missing)} tensor{'s' * (len(missing) > 1)} of the base: "
                f"{shorten(missing)}; leave them out with --exclude if that is meant"
            )
        self.out.problems += [f'model "{self.label}": {problem}' for problem in shapes]
        self.out.notes += [
            f'model "{self.label}": {count} tensors are {dtype}, the base is {want}: '
            f"the result is {want}"
            for (dtype, want), count in dtypes.items()
        ]
        return outside

    def find_extras(self) -> None:
        """Note what this model has and the base has not, or has outside the scope."""
        label, known = self.label, {canonical(name) for name in self.base}
        ignored = self.out.ignored.get(label, {}).values()
        used = {*self.pairs.values(), *(n for names in ignored for n in names)}
        used |= {name for name, _ in self.out.tied.get(label, ())}
        extra = []
        for name, entry in self.entries.items():
            part = part_of(name, self.theirs)
            if name in used:
                continue
            shared = name.startswith(self.theirs)
            if shared and self.ours + canonical(name)[len(self.theirs) :] in known:
                self.ignore("outside --scope", name)
            elif part in PARTS:
                self.ignore(f"{part}: not in the base", name)
            elif not entry.floating:
                self.ignore("not a float tensor", name)
            else:
                extra.append(name)
        if extra:
            self.out.problems.append(
                f'model "{label}": has {len(extra)} tensor{"s" * (len(extra) > 1)} that the base '
                f"lacks: {shorten(extra)}; was it fine-tuned from another base?"
            )
