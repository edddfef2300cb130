"""How to train: the recipe of `deltafl finetune`, and its preset `deltafl centralized`."""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field

from deltafl.errors import DeltaflError
from deltafl.models.adapter import LoraRecipe
from deltafl.models.head import HeadRecipe
from deltafl.recipes import Flags, Incidental, Recipe
from deltafl.tasks.recipe import TrainingDataRecipe

PRECISIONS: Mapping[str, torch.dtype | None] = {"no": None, "bf16": torch.bfloat16}


class RunRecipe(Recipe):
    """What every training has: a model, a task, a seed, and a folder to write."""

    model: Annotated[str, Flags(("--model", "--base"))] = Field(
        description="the model to begin with: a folder, a hub id, a config.json or module:attr"
    )
    mixed_precision: Literal["no", "bf16"] = Field(
        "no", description="the arithmetic of the model's forward pass"
    )
    gradient_checkpointing: bool = Field(
        False, description="compute activations again in the backward pass, to save memory"
    )
    seed: int = Field(0, description="of everything that is random")
    device: Annotated[str | None, Incidental] = Field(
        None, description="cpu, cuda or cuda:1 (default: the GPU where there is one)"
    )
    out: Annotated[str | None, Incidental] = Field(None, description="the folder to write")
    overwrite: Annotated[bool, Incidental] = Field(
        False, description="replace an existing output, or an unfinished run"
    )
    data: TrainingDataRecipe
    head: HeadRecipe = HeadRecipe.of()

    @property
    def autocast(self) -> torch.dtype | None:
        """The dtype of the forward pass, None for the model's own."""
        return PRECISIONS[self.mixed_precision]

    @property
    def output(self) -> Path:
        """The folder to write. Raises DeltaflError if there is none."""
        if self.out is None:
            raise DeltaflError("no output; name a folder with --out")
        return Path(self.out)


class StepRecipe(Recipe):
    """How a model steps."""

    batch_size: int = Field(
        64, ge=1, description="examples in a step, over all processes of a run together"
    )
    micro_batch_size: int | None = Field(
        None, ge=1, description="examples in memory at a time; gradients of a step add up (all)"
    )
    lr: float = Field(0.01, gt=0, description="learning rate; its peak, where a schedule is given")
    lr_schedule: Literal["constant", "cosine", "linear", "step"] = Field(
        "constant", description="of the learning rate, over all steps after the warm-up, or rounds"
    )
    momentum: float = Field(
        0.9, ge=0, lt=1, description="of sgd; a client's starts anew in each round"
    )
    nesterov: bool = Field(False, description="Nesterov momentum in sgd")
    weight_decay: float = Field(0.0, ge=0, description="of the optimiser")
    grad_clip: float | None = Field(
        None, gt=0, description="largest gradient norm, over what trains"
    )

    def problems(self) -> Iterator[str]:
        if self.nesterov and not self.momentum:
            yield "nesterov needs a momentum above 0"


class TrainingRecipe(LoraRecipe, StepRecipe, RunRecipe):
    """How to train a model on a task; the defaults are those of the task-arithmetic papers for CLIP
    and ViT.
    """

    renamed: ClassVar = {"base": "model", "schedule": "lr_schedule"}
    alternatives: ClassVar = (("steps", "epochs"),)
    defaults: ClassVar = {
        "batch_size": 128,
        "lr": 1e-5,
        "lr_schedule": "cosine",
        "momentum": 0.0,
        "weight_decay": 0.1,
        "grad_clip": 1.0,
    }

    steps: int | None = Field(
        None, ge=0, description="optimiser steps; 0 writes the model with its head"
    )
    epochs: float | None = Field(
        None, gt=0, description="passes over the training data, instead of steps"
    )
    warmup: int | None = Field(
        None, ge=0, description="steps of warm-up (default: 10 % of the steps, at most 500)"
    )
    optimizer: Literal["adamw", "sgd"] = Field("adamw", description="what steps")
    eval_every: int | None = Field(
        None,
        ge=1,
        description="epochs between validations, of which the best model is kept (default: one "
        "validation, of the last model)",
    )
    patience: int | None = Field(
        None, ge=1, description="validations without a gain after which to stop"
    )
    save_every: Annotated[int, Incidental] = Field(
        500, ge=0, description="steps between saved states, beside those of validations; 0: none"
    )

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        spare = (None,) if self.steps is None else (None, self.defaults.get("epochs"))
        if (self.epochs in spare) == (self.steps is None):
            yield "give either steps or epochs"

    def num_steps(self, num_examples: int) -> int:
        """Optimiser steps in all; an epoch is ceil(num_examples / batch_size) of them."""
        if self.steps is not None:
            return self.steps
        return math.ceil((self.epochs or 0) * self.steps_in_epoch(num_examples))

    def steps_in_epoch(self, num_examples: int) -> int:
        """ceil(num_examples / batch_size)."""
        return math.ceil(num_examples / self.batch_size)

    def warmup_steps(self, num_examples: int) -> int:
        """Steps of warm-up."""
        total = self.num_steps(num_examples)
        return min(500, total // 10) if self.warmup is None else self.warmup


class CentralizedRecipe(TrainingRecipe):
    """Train with SGDM on all samples in one place, what federated runs are compared with: validated
    after every epoch, and the best epoch tested.
    """

    defaults: ClassVar = {
        "epochs": 50.0,
        "batch_size": 64,
        "lr": 0.001,
        "warmup": 0,
        "optimizer": "sgd",
        "momentum": 0.9,
        "weight_decay": 0.0,
        "grad_clip": None,
        "eval_every": 1,
    }
