"""The scores of a model on a task."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor

from deltafl.algebra.tensors import device_named
from deltafl.models import Net
from deltafl.recipes import Flags, Incidental, Recipe
from deltafl.tasks import DataRecipe, Task
from deltafl.tasks.task import Split, require_examples
from deltafl.training.recipe import PRECISIONS
from deltafl.training.step import scores


class EvaluationRecipe(Recipe):
    """Which models are judged, and on what."""

    models: tuple[str, ...] = Field(
        min_length=1, description="models that finetune or merge wrote: folders or hub ids"
    )
    split: Literal["test", "val"] = Field("test", description="the examples that count")
    head: str | None = Field(
        None,
        description="a head.safetensors, or zero-shot (CLIP) (default: that of each model)",
    )
    templates: str | None = Field(
        None,
        description="prompts for the zero-shot head: a file, one on each line, {} for the class",
    )
    seed: int | None = Field(
        None,
        description="of the validation split (default: the one that the model was trained with)",
    )
    batch_size: Annotated[int, Incidental] = Field(256, ge=1, description="examples at once")
    mixed_precision: Literal["no", "bf16"] = Field(
        "no", description="the arithmetic of the model's forward pass"
    )
    device: Annotated[str | None, Incidental] = Field(
        None, description="cpu, cuda or cuda:1 (default: the GPU where there is one)"
    )
    json_file: Annotated[str | None, Incidental, Flags(("--json",))] = Field(
        None, description="write the scores, and those of each example, to this file"
    )
    data: DataRecipe

    def problems(self) -> Iterator[str]:
        if self.templates is not None and self.head != "zero-shot":
            yield "templates are about the zero-shot head; give --head zero-shot too"


@dataclass(frozen=True)
class Evaluation:
    """The mean score, and that of each example, float32 (n,)."""

    score: float
    scores: Tensor


def evaluate(
    net: Net,
    task: Task,
    split: Split = "test",
    *,
    batch_size: int = 256,
    device: str | None = None,
    mixed_precision: str = "no",
) -> Evaluation:
    """How well a model does on a split of a task; `device` None: the GPU where there is one.

    Raises:
        DeltaflError: a split without examples, a model without a head for the task, no such device.
    """
    require_examples(task, split)
    net.check(task)
    where = device_named(device)
    autocast = PRECISIONS[mixed_precision]
    found = scores(net.copy_to(where), task, split, None, batch_size, autocast)
    return Evaluation(found.double().mean().item(), found)
