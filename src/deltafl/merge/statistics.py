"""Statistics of examples beside a model, which a merge takes in place of the examples."""

from functools import partial
from math import prod
from pathlib import Path
from typing import Literal, TypeAlias

from deltafl.checkpoints.layout import fingerprint, read_header
from deltafl.errors import DeltaflError, attempt
from deltafl.merge.layerwise import Statistics
from deltafl.merge.maps import Map
from deltafl.merge.plan import Plan, read_json
from deltafl.recipes import Recipe

Kind: TypeAlias = Literal["gram", "fisher"]

KINDS: dict[str, Kind] = {"regmean": "gram", "fisher": "fisher"}
"""Method -> the statistics that are enough for it."""

FOLDER, NOTE, PART = "statistics", "statistics.json", "{:05d}.safetensors"
"""MODEL/FOLDER/KIND holds NOTE and a PART for each tensor."""


class Note(Recipe):
    """What NOTE says: of which model, by its fingerprint, and of which examples.

    tensors: their names in the model, in the order of the parts; of a map's weight -> its bias.
    """

    kind: Kind
    model: str
    task: str
    examples: int
    seed: int
    tensors: dict[str, str | None]
    versions: dict[str, str]


def read_statistics(plan: Plan) -> tuple[list[Note], list[partial[Statistics]]]:
    """The statistics of each model of a plan, which want its tensors and weight.

    Raises:
        DeltaflError: one that is missing, or of another kind, model, shape, seed or number of
            examples than the merge; one line for each model.
    """
    problems = list[str]()
    found = [one for name in plan.layouts if (one := attempt(problems, _read, plan, name))]
    if not problems:
        first = found[0][1:]
        problems += [
            f'"{plan.layouts[name].folder / FOLDER}": of other tensors than those of model '
            f'"{next(iter(plan.layouts))}"; make both anew with one version of deltafl'
            for name, (_, maps, files) in zip(plan.layouts, found, strict=True)
            if (maps, files.keys()) != (first[0], first[1].keys())
        ]
    if problems:
        raise DeltaflError(*problems)
    return [one[0] for one in found], [partial(Statistics, *one[1:]) for one in found]


def _read(plan: Plan, name: str) -> tuple[Note, list[Map], dict[str, Path]]:
    layout, method, params = plan.layouts[name], plan.rule.core.name, plan.recipe.params
    kind = KINDS[method]
    folder = layout.folder / FOLDER / kind
    if not (folder / NOTE).is_file():
        raise DeltaflError(
            f'model "{name}": {method} needs its task, named with --tasks, or "{folder}", which '
            f"`deltafl statistics --kind {kind}` writes"
        )
    note = read_json(Note, folder / NOTE)
    told = {
        "kind": (note.kind, kind),
        "model": (note.model, fingerprint(layout)),
        "number of examples": (note.examples, params.get("examples", note.examples)),
        "seed": (note.seed, params.get("seed", note.seed)),
    }
    if odd := [what for what, (held, wanted) in told.items() if held != wanted]:
        raise DeltaflError(
            f'"{folder / NOTE}": of another {" and ".join(odd)} than this merge; make it anew '
            "with `deltafl statistics`"
        )
    ours = {own: base for base, own in plan.alignment.names[name].items()}
    maps, files = list[Map](), dict[str, Path]()
    for number, (own, own_bias) in enumerate(note.tensors.items(), 1):
        part, weight, bias = folder / PART.format(number), ours.get(own), ours.get(own_bias or "")
        held = read_header(part)
        if weight not in plan.alignment.merged:
            continue
        shape = plan.base.entries[weight].shape
        out, width = prod(shape[:1]), prod(shape[1:]) + bool(bias)
        grams = [(n, width, width) for n in range(1, out + 1) if out % n == 0]
        if [*held] != [own] or held[own].shape not in (grams if kind == "gram" else [shape]):
            raise DeltaflError(
                f'"{part}": holds no {kind} of tensor "{own}" {shape}; make it anew with '
                "`deltafl statistics`"
            )
        files[weight] = part
        maps += [Map(weight, bias, groups=held[own].shape[0])] if kind == "gram" else []
    return note, maps, files
