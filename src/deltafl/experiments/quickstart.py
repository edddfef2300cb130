"""The whole story on scikit-learn's digits, offline: pre-train, fine-tune, merge, search, test once."""

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deltafl.datasets import load_task
from deltafl.experiments.one_shot import SearchSpec, TaskModel, run_search
from deltafl.finetuning import FinetuneRecipe, finetune
from deltafl.models import load_encoder
from deltafl.models.heads import HEAD_FILE
from deltafl.models.pretrained import new_vit
from deltafl.preflight import MergeSpec, Model
from deltafl.training import keyed_generator

IMAGE_SIZE = 16


@dataclass(frozen=True)
class Finetune:
    """How one task is fine-tuned: on purpose not like the others."""

    variant: str
    lr: float
    steps: int


TASKS = (
    Finetune("inverted", 1e-3, 120),
    Finetune("rotated", 5e-4, 240),
    Finetune("mirrored", 5e-4, 60),
    Finetune("scrambled", 1e-3, 160),
    Finetune("shifted", 1.5e-3, 200),
)

METHODS: Sequence[tuple[str, dict[str, Any]]] = (
    ("task_arithmetic", {}),
    ("fednova", {}),
    ("fedgma", {}),
    ("median", {}),
    ("cclip", {}),
)
"""Every rule of arXiv 2411.18607; rho of fedgma and cclip has its default grid."""

LAMBDAS = tuple(round(0.1 * i, 1) for i in range(1, 16))


def run_quickstart(
    folder: Path,
    *,
    seed: int = 0,
    on_stage: Callable[[str, int, int], None] = lambda name, done, total: None,
) -> dict[str, Any]:
    """Write base, models/* and merged into `folder`; return the result for table and report. Same seed, same numbers.

    on_stage: told (what is going on, done, total).
    """
    started = time.perf_counter()
    pretrain(folder / "base", seed, on_stage)
    for task in TASKS:
        fine_tune(folder, task, seed, on_stage)
    rows = itertools.count(1)
    result = run_search(
        search_spec(folder, seed),
        folder / "merged",
        on_row=lambda row, total: on_stage("search on validation", next(rows), total),
    )
    return {**result, "seconds": time.perf_counter() - started}


def pretrain(out: Path, seed: int, on_stage: Callable[[str, int, int], None]) -> None:
    """A small ViT, trained with its head on the pre-training half of the plain digits."""
    generator = keyed_generator(seed, "base")
    encoder = new_vit(hidden=64, layers=4, heads=4, patch=4, image_size=IMAGE_SIZE, channels=1, generator=generator)
    task = load_task("digits:pretrain", image_size=IMAGE_SIZE, channels=1, seed=seed)
    recipe = FinetuneRecipe(steps=300, lr=1e-3, batch_size=64, head="linear", train_head=True, seed=seed)
    finetune(encoder, task, recipe, out, save_every=0, on_progress=lambda d, t, _: on_stage("pre-train", d, t))


def fine_tune(folder: Path, task: Finetune, seed: int, on_stage: Callable[[str, int, int], None]) -> None:
    """One fine-tune of the base on one variant of the digits, with the base's head, frozen."""
    data = load_task(f"digits:{task.variant}", image_size=IMAGE_SIZE, channels=1, seed=seed)
    head = str(folder / "base" / HEAD_FILE)
    recipe = FinetuneRecipe(steps=task.steps, lr=task.lr, batch_size=64, head=head, seed=seed)
    encoder = load_encoder(folder / "base")
    finetune(
        encoder,
        data,
        recipe,
        folder / "models" / task.variant,
        save_every=0,
        on_progress=lambda d, t, _: on_stage(f"fine-tune {task.variant}", d, t),
    )


def search_spec(folder: Path, seed: int) -> SearchSpec:
    """The search over all rules of the paper."""
    models = tuple(Model(str(folder / "models" / t.variant), t.variant) for t in TASKS)
    return SearchSpec(
        merge=MergeSpec(str(folder / "base"), models, "task_arithmetic"),
        models=tuple(TaskModel(m, f"digits:{m.name}") for m in models),
        methods=tuple(METHODS),
        lambdas=LAMBDAS,
        seed=seed,
    )
