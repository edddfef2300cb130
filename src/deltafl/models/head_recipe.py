"""The settings of a classifier's head."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from pydantic import Field
from torch import Tensor

from deltafl.recipes import Recipe


class HeadRecipe(Recipe):
    """The head of a classifier: what is on top of its features, and whether it trains."""

    head: str = Field(
        "ridge",
        description="ridge (closed form, from sums of statistics), probe (logistic regression), "
        "linear (random weights), zero-shot (CLIP's text tower) or a head.safetensors file",
    )
    few_shot: int | None = Field(
        None, ge=1, description="fit the ridge head on so many examples of each class, not on all"
    )
    templates: str | None = Field(
        None,
        description="prompts for the zero-shot head: a file, one on each line, {} for the class",
    )
    train_head: bool = Field(False, description="train the head together with the encoder")

    def problems(self) -> Iterator[str]:
        if self.few_shot is not None and self.head != "ridge":
            yield "few_shot is about the ridge head"
        if self.templates is not None and self.head != "zero-shot":
            yield "templates are about the zero-shot head; give --head zero-shot too"


@dataclass(frozen=True)
class HeadFit:
    """What a head is fitted with. shards: the rows of the training split that each client holds,
    whose statistics are summed; None: all in one place. autocast: dtype of the encoder's
    arithmetic.
    """

    seed: int = 0
    shards: Sequence[Tensor] | None = None
    autocast: torch.dtype | None = None
