"""How to fine-tune: one frozen recipe, checked where it is used."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from deltafl.errors import did_you_mean
from deltafl.models.heads import ZERO_SHOT
from deltafl.training.step import SCHEDULES

OPTIMIZERS = ("adamw", "sgd")
PRECISIONS: Mapping[str, torch.dtype | None] = {"no": None, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class FinetuneRecipe:
    """How to fine-tune; the defaults are those of the task-arithmetic papers for CLIP and ViT.

    Exactly one of `steps` and `epochs` is given. `warmup` None: min(500, 10 % of the steps). `grad_clip` None: no
    clipping. `momentum` counts for sgd. `head`: "ridge", "linear" (random weights), "zero-shot" (CLIP's text tower)
    or the path of a head.safetensors; `few_shot`: fit the ridge head on so many examples per class instead of all;
    `templates`: a file of prompts for the zero-shot head, one on each line. `mixed_precision`: "no" or "bf16".
    """

    steps: int | None = None
    epochs: float | None = None
    lr: float = 1e-5
    weight_decay: float = 0.1
    batch_size: int = 128
    optimizer: str = "adamw"
    momentum: float = 0.0
    schedule: str = "cosine"
    warmup: int | None = None
    grad_clip: float | None = 1.0
    label_smoothing: float = 0.0
    head: str = "ridge"
    few_shot: int | None = None
    templates: str | None = None
    train_head: bool = False
    mixed_precision: str = "no"
    seed: int = 0

    def problems(self) -> list[str]:
        """What is wrong with the values, one line each."""
        rules = (
            ((self.steps is None) != (self.epochs is None), "give either steps or epochs"),
            (self.steps is None or self.steps >= 0, f"steps must be 0 or more, not {self.steps}"),
            (self.epochs is None or self.epochs > 0, f"epochs must be positive, not {self.epochs}"),
            (self.lr > 0, f"lr must be positive, not {self.lr}"),
            (self.weight_decay >= 0, f"weight_decay must be 0 or more, not {self.weight_decay}"),
            (self.batch_size >= 1, f"batch_size must be 1 or more, not {self.batch_size}"),
            (0 <= self.momentum < 1, f"momentum must be in [0, 1), not {self.momentum}"),
            (
                self.warmup is None or self.warmup >= 0,
                f"warmup must be 0 or more, not {self.warmup}",
            ),
            (
                self.grad_clip is None or self.grad_clip > 0,
                f"grad_clip must be positive, not {self.grad_clip}",
            ),
            (
                0 <= self.label_smoothing < 1,
                f"label_smoothing must be in [0, 1), not {self.label_smoothing}",
            ),
            (self.few_shot is None or self.head == "ridge", "few_shot is about the ridge head"),
            (
                self.templates is None or self.head == ZERO_SHOT,
                "templates are about the zero-shot head",
            ),
            *(
                (value in known, f'unknown {kind} "{value}"; {did_you_mean(value, known)}')
                for kind, value, known in (
                    ("optimizer", self.optimizer, OPTIMIZERS),
                    ("schedule", self.schedule, SCHEDULES),
                    ("mixed_precision", self.mixed_precision, PRECISIONS),
                )
            ),
        )
        return [problem for good, problem in rules if not good]

    def num_steps(self, num_examples: int) -> int:
        """Optimiser steps in all; an epoch is ceil(num_examples / batch_size) of them."""
        if self.steps is not None:
            return self.steps
        return math.ceil((self.epochs or 0) * math.ceil(num_examples / self.batch_size))
