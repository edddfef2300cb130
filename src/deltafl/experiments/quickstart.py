"""The whole story on scikit-learn's digits, offline: pre-train, fine-tune, merge, search, test once."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from deltafl.experiments.one_shot import run_search
from deltafl.merge.search_recipe import SearchRecipe
from deltafl.models import HEAD_FILE, Net, load_net, new_net
from deltafl.pool import one_thread
from deltafl.progress import Progress
from deltafl.seeding import keyed_generator
from deltafl.tasks import load_task
from deltafl.training import TrainingRecipe, finetune

IMAGE_SIZE = 16

BASE = {
    "model_type": "vit",
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 256,
    "patch_size": 4,
    "image_size": IMAGE_SIZE,
    "num_channels": 1,
}
"""The model to begin with, as transformers names its settings."""


@dataclass(frozen=True)
class Finetune:
    """How one task is fine-tuned: on purpose not like the others."""

    variant: str
    lr: float
    steps: int


TASKS = (
    Finetune("textured", 2e-4, 80),
    Finetune("thick", 1e-4, 200),
    Finetune("mirrored", 1e-4, 240),
    Finetune("outlined", 3e-4, 160),
)

LAMBDAS = tuple(round(0.1 * i, 1) for i in range(1, 11))

OnStage: TypeAlias = Callable[[str, int, int], None]
"""Told what is going on, how much of it is done, and of how much."""


def run_quickstart(
    folder: Path,
    *,
    seed: int = 0,
    on_stage: OnStage = lambda name, done, total: None,
) -> dict[str, Any]:
    """Write base, models/* and merged into `folder`; return the result for table and report. Same seed, same numbers.

    One thread: a model this small gains nothing from more, and sums then have one order on every machine.
    """
    started = time.perf_counter()
    with one_thread():
        result = _story(folder, seed, on_stage)
    return {**result, "seconds": time.perf_counter() - started}


def _story(folder: Path, seed: int, on_stage: OnStage) -> dict[str, Any]:
    pretrain(folder / "base", seed, on_stage)
    for task in TASKS:
        fine_tune(folder, task, seed, on_stage)
    return run_search(
        search_recipe(folder, seed),
        folder / "merged",
        on_progress=lambda p: on_stage(p.name, p.done, p.total),
    )


def pretrain(out: Path, seed: int, on_stage: OnStage) -> None:
    """A small ViT, trained with its head on the pre-training half of the plain digits."""
    net = new_net(BASE, keyed_generator(seed, "base"))
    recipe = TrainingRecipe.of(
        model="a new ViT",
        data="digits:pretrain",
        steps=800,
        lr=1e-3,
        batch_size=32,
        head="linear",
        train_head=True,
        seed=seed,
        save_every=0,
        out=str(out),
    )
    _finetune(net, recipe, "pre-train", on_stage)


def fine_tune(folder: Path, task: Finetune, seed: int, on_stage: OnStage) -> None:
    """One fine-tune of the base on one variant of the digits, with the base's head, frozen."""
    base = folder / "base"
    recipe = TrainingRecipe.of(
        model=str(base),
        data=f"digits:{task.variant}",
        steps=task.steps,
        lr=task.lr,
        batch_size=32,
        head=str(base / HEAD_FILE),
        seed=seed,
        save_every=0,
        out=str(folder / "models" / task.variant),
    )
    _finetune(load_net(base), recipe, f"fine-tune {task.variant}", on_stage)


def _finetune(net: Net, recipe: TrainingRecipe, stage: str, on_stage: OnStage) -> None:
    def tell(progress: Progress) -> None:
        if progress.name == "steps":
            on_stage(stage, progress.done, progress.total)

    finetune(net, load_task(recipe.data, net.inputs, recipe.seed), recipe, on_progress=tell)


def search_recipe(folder: Path, seed: int) -> SearchRecipe:
    """The search over all rules of the paper."""
    models = [
        {"path": str(folder / "models" / t.variant), "data": f"digits:{t.variant}"} for t in TASKS
    ]
    return SearchRecipe.of(
        base=str(folder / "base"), models=models, scaling_coefs=LAMBDAS, seed=seed
    )
