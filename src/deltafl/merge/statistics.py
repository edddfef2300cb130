"""Statistics of examples beside a model, which a merge takes in place of the examples."""

from collections.abc import Iterator
from math import prod
from pathlib import Path

from deltafl.checkpoints.layout import fingerprint, read_header
from deltafl.errors import DeltaflError
from deltafl.merge.maps import Map
from deltafl.merge.plan import Plan
from deltafl.merge.reading import read_json
from deltafl.merge.recipe import KINDS, StatisticsRecipe

FOLDER, NOTE, PART = "statistics", "statistics.json", "{:05d}.safetensors"
"""MODEL/FOLDER/KIND holds NOTE and a PART for each tensor."""


class Note(StatisticsRecipe):
    """What NOTE says: the recipe, but of a model the fingerprint and of a task the name.

    tensors: their names in the model, in the order of the parts; of a map's weight -> its bias.
    """

    tensors: dict[str, str | None]
    versions: dict[str, str]


def read_statistics(plan: Plan) -> Iterator[tuple[Note, dict[Map, Path]]]:
    """What there is beside each model of a plan: the note, and the files as `Statistics` has them.

    Raises:
        DeltaflError: it is missing, or of another kind, model, shape, seed or number of examples
            than the merge, or of other tensors than that beside the first model.
    """
    kind, again = KINDS[plan.rule.core.name], "make it anew with `deltafl statistics`"
    first = dict[Map, Path]()
    for name, layout in plan.layouts.items():
        folder = layout.folder / FOLDER / kind
        if not (folder / NOTE).is_file():
            raise DeltaflError(
                f'model "{name}": {plan.recipe.method} needs its task, named with --tasks, or '
                f'"{folder}", which `deltafl statistics --kind {kind}` writes'
            )
        note = read_json(Note, folder / NOTE)
        here = {"kind": kind, "model": fingerprint(layout)} | plan.recipe.params
        if odd := [key for key in here if dict(note).get(key, here[key]) != here[key]]:
            raise DeltaflError(
                f'"{folder / NOTE}": differs from this merge in {" and ".join(odd)}; {again}'
            )
        ours = {own: base for base, own in plan.alignment.names[name].items()}
        files = dict[Map, Path]()
        for number, (own, bias) in enumerate(note.tensors.items(), 1):
            part, weight, bias = folder / PART.format(number), ours.get(own), ours.get(bias or "")
            held = {name: entry.shape for name, entry in read_header(part).items()}
            if weight not in plan.alignment.merged:
                continue
            shape = plan.base.entries[weight].shape
            fits, width = {1: shape}, prod(shape[1:]) + bool(bias)
            if kind == "gram":
                fits = {n: (n, width, width) for n in range(1, shape[0] + 1) if shape[0] % n == 0}
            groups = [n for n in fits if held == {own: fits[n]}]
            if not groups:
                raise DeltaflError(f'"{part}": holds no {kind} of "{own}" {shape}; {again}')
            files[Map(weight, bias, groups=groups[0])] = part
        first = first or files
        if files.keys() != first.keys():
            raise DeltaflError(f'"{folder}": of other tensors than beside the first model; {again}')
        yield note, files
