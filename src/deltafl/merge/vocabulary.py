"""Models of other vocabularies in one merge: the rows of each found by the tokens of the output."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from deltafl.checkpoints.align import Alignment
from deltafl.checkpoints.layout import Entry, Layout
from deltafl.checkpoints.vocabulary import (
    Sources,
    Vocabulary,
    added_token,
    read_vocabulary,
    union,
)
from deltafl.errors import DeltaflError, attempt, did_you_mean, shorten
from deltafl.merge.recipe import MergeRecipe, TokenRecipe


@dataclass(frozen=True)
class Matching:
    """The output's vocabulary; and of each whole model, the base "" first, its entries with the
    rows of that, and what these are.
    """

    vocabulary: Vocabulary
    entries: Mapping[str, Mapping[str, Entry]]
    rows: Mapping[str, Sequence[Sources | None]]
    tensors: Sequence[str]
    notes: tuple[str, ...]

    def places(self, alignment: Alignment) -> dict[str, dict[str, str]]:
        """Tensor of the base with these rows -> model -> the tensor's name there."""
        names = alignment.names
        return {
            name: {label: names[label][name] if label else name for label in self.rows}
            for name in self.tensors
        }

    def problems(self, alignment: Alignment) -> Iterator[str]:
        """The tensors with these rows that a model lacks, or an adapter changes."""
        for label, names in alignment.names.items():
            whole = label in self.rows
            if odd := [name for name in self.tensors if (name in names) != whole]:
                why = "lacks" if whole else "is an adapter, and no whole model, that changes"
                yield f'model "{label}": {why} {shorten(odd)}, whose rows are matched by token'


def match_vocabularies(
    recipe: MergeRecipe, layouts: Mapping[str, Layout], labels: Mapping[str, str]
) -> Matching:
    """Find the vocabulary of a recipe, and every row of it for every model.

    layouts: of the base, "", and the models that are no adapters. labels: reference -> model.

    Raises:
        DeltaflError: no such model, or no tokenizer or rows of one; `tokens` names a row that is
            not.
    """
    problems = list[str]()
    found = {label: attempt(problems, read_vocabulary, one) for label, one in layouts.items()}
    models = {label: one for label, one in found.items() if one}
    if problems:
        raise DeltaflError(*problems)
    if recipe.vocabulary == "union":
        out = union(*models.values())
    else:
        out = models[_whole(recipe.vocabulary or "base", models, labels)]
    out = out.extended(added_token(token) for token in recipe.tokens if token not in out.ids)
    out = replace(out, rows=out.size + -out.size % (recipe.pad_to_multiple_of or 1))
    default = {
        token: attempt(problems, _sources, token, recipe.tokens.get(token), models, labels)
        for token in out.ids
    }
    if problems:
        raise DeltaflError(*problems)
    forced = {token for token, rule in recipe.tokens.items() if rule.force}
    rows, entries, notes = dict[str, Sequence[Sources | None]](), {}, list[str]()
    for label, one in models.items():
        own = {token: ((label, i),) for token, i in one.ids.items() if token not in forced}
        held = {i: own.get(token, default[token]) for token, i in out.ids.items()}
        rows[label] = [held.get(i) for i in range(out.rows)]
        entries[label] = {
            name: replace(e, shape=(out.rows, *e.shape[1:])) if name in one.tensors else e
            for name, e in layouts[label].entries.items()
        }
        if lost := [token for token in one.ids if token not in out.ids]:
            notes.append(f'"{layouts[label].ref}": the result has no {shorten(lost)}')
    return Matching(out, entries, rows, models[""].tensors, tuple(notes))


def _whole(ref: str, models: Mapping[str, Vocabulary], labels: Mapping[str, str]) -> str:
    """The model that is meant. Raises DeltaflError if none is, or an adapter."""
    label = labels.get(ref, ref)
    if label not in models:
        known = did_you_mean(ref, [other for other in labels if labels[other] in models])
        raise DeltaflError(f'vocabulary: "{ref}" is no whole model of this merge; {known}')
    return label


def _sources(
    token: str,
    rule: TokenRecipe | None,
    models: Mapping[str, Vocabulary],
    labels: Mapping[str, str],
) -> Sources:
    """What a token's row is in models that lack it: as it is told, or the base's, or the mean of
    all there are. Raises DeltaflError.
    """
    if rule is None:
        held = [(label, one.ids[token]) for label, one in models.items() if token in one.ids]
        return tuple(held[:1] if token in models[""].ids else held)
    if rule.model is None:
        return ()
    label, name = _whole(rule.model, models, labels), rule.token or token
    row = models[label].ids.get(name, -1) if rule.token_id is None else rule.token_id
    if not 0 <= row < models[label].rows:
        what = f'token "{name}"' if row < 0 else f"row {row}"
        raise DeltaflError(f'tokens: "{token}": model "{rule.model}" has no {what}')
    return ((label, row),)
