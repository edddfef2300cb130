"""Statistics of a model on its task, written once so that a merge needs no examples."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

from pydantic import Field
from safetensors.torch import save
from torch import Tensor

from deltafl.checkpoints.layout import fingerprint
from deltafl.errors import DeltaflError
from deltafl.files import atomic_folder, check_output, write_atomically
from deltafl.merge.examples import load_nets
from deltafl.merge.gradients import fisher_information
from deltafl.merge.inputs import open_updates
from deltafl.merge.layerwise import Client, Examples, Start, find_maps
from deltafl.merge.plan import plan_merge
from deltafl.merge.recipe import MergeRecipe
from deltafl.merge.run import VERSIONS
from deltafl.merge.statistics import FOLDER, KINDS, NOTE, PART, Kind, Note
from deltafl.progress import OnProgress, Progress, ignore
from deltafl.recipes import Incidental, Recipe
from deltafl.rules.fisher import Fisher
from deltafl.rules.rule import ExampleRule, LayerRule


class StatisticsRecipe(Recipe):
    """What a merge by regmean (gram) or fisher needs of a fine-tuned model and its task."""

    model: str = Field(description="The fine-tuned model: folder, file or hub id.")
    task: str = Field(description="Its task, as --data takes one.")
    kind: Kind = Field(description="gram, for regmean, or fisher.")
    examples: int = Field(128, ge=1, description="Of the train split, without labels.")
    seed: int = Field(0, description="Draws the examples.")
    data_dir: Annotated[str | None, Incidental] = Field(
        None, description="The folder that holds tasks by name. Default: they come from the hub."
    )
    device: Annotated[str, Incidental] = Field("cpu", description="Where to compute: cpu or cuda.")
    out: Annotated[str | None, Incidental] = Field(
        None, description="The folder to write. Default: statistics/KIND in the model's folder."
    )
    overwrite: Annotated[bool, Incidental] = Field(False, description="Replace an existing output.")

    @property
    def output(self) -> Path:
        """The folder to write. Raises DeltaflError if there is none."""
        if self.out is None and not Path(self.model).is_dir():
            raise DeltaflError(f'"{self.model}" is no folder; name one to write with --out')
        return Path(self.out or Path(self.model) / FOLDER / self.kind)

    def merge(self) -> MergeRecipe:
        """The model into itself, by the method that takes such statistics."""
        method = next(name for name, kind in KINDS.items() if kind == self.kind)
        return MergeRecipe.of(
            base=self.model,
            models=(self.model,),
            tasks=(self.task,),
            method=method,
            allow_other_base=True,
            **self.model_dump(include={"examples", "seed", "data_dir", "device"}),
        )


def write_statistics(recipe: StatisticsRecipe, on_progress: OnProgress = ignore) -> Path:
    """Run the model once and write the folder, whole or not at all; returns it.

    Raises:
        DeltaflError: bad input; the folder exists.
    """
    out, plan = recipe.output, plan_merge(recipe.merge())
    plan.refuse_as_output(out)
    check_output(out, overwrite=recipe.overwrite)
    (net,), (task,) = load_nets(plan)
    opened = open_updates(plan)
    examples = Examples(net, task, *opened.tuned.values(), weight=1.0)
    rule, start = plan.rule.core, Start(opened.base, opened.base, opened.base.dtype)
    assert isinstance(rule, ExampleRule)
    names, tensors = _made(rule, start, examples)
    note = Note(
        kind=recipe.kind,
        model=fingerprint(plan.base),
        task=task.name,
        examples=recipe.examples,
        seed=recipe.seed,
        tensors=names,
        versions=VERSIONS,
    )
    with atomic_folder(out, overwrite=recipe.overwrite) as folder:
        for number, (name, tensor) in enumerate(zip(names, tensors, strict=True), 1):
            write_atomically(folder / PART.format(number), save({name: tensor}))
            on_progress(Progress("statistics", number, len(names)))
        (folder / NOTE).write_text(json.dumps(note.resolved(), indent=2))
    return out


def _made(
    rule: ExampleRule, start: Start, examples: Examples
) -> tuple[dict[str, str | None], Iterator[Tensor]]:
    """`Note.tensors`, and the tensors; of maps only one at a time is held."""
    if isinstance(rule, Fisher):
        found = fisher_information(rule, start, examples)
        return dict.fromkeys(found), iter(found.values())
    assert isinstance(rule, LayerRule)
    maps = find_maps(start, examples)
    client = Client(examples, start, rule, maps)

    def sent() -> Iterator[Tensor]:
        try:
            for m in maps:
                yield client.moments(m, client.advance())[1]
        finally:
            client.leave()

    return {m.weight: m.bias for m in maps}, sent()
