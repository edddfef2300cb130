"""The whole story on scikit-learn's digits, offline: pre-train, fine-tune, merge, search, test once."""

import time
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from deltafl.merge.search_recipe import SearchRecipe
from deltafl.merge.search_run import run_search
from deltafl.models import HEAD_FILE, Net, load_net, new_net
from deltafl.pool import one_thread
from deltafl.progress import OnProgress, Progress, ignore
from deltafl.seeding import keyed_generator
from deltafl.tasks import load_task
from deltafl.training import TrainingRecipe, finetune

BASE = {
    "model_type": "vit",
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 256,
    "patch_size": 4,
    "image_size": 16,
    "num_channels": 1,
}
"""The model to begin with, as transformers names its settings."""


class Variant(NamedTuple):
    """A variant of the digits, and how a model is fine-tuned on it: on purpose not like the others."""

    name: str
    lr: float
    steps: int


VARIANTS = (
    Variant("textured", 2e-4, 80),
    Variant("thick", 1e-4, 200),
    Variant("mirrored", 1e-4, 240),
    Variant("outlined", 3e-4, 160),
)

LAMBDAS = tuple(round(0.1 * i, 1) for i in range(1, 11))


def run_quickstart(
    folder: Path, *, seed: int = 0, on_progress: OnProgress = ignore
) -> dict[str, Any]:
    """Write base, models/* and merged into `folder`; return the result for table and report.

    One thread: a model this small gains nothing from more, and sums then have one order.
    """
    started = time.perf_counter()
    with one_thread():
        pretrain(folder / "base", seed, on_progress)
        for variant in VARIANTS:
            fine_tune(folder, variant, seed, on_progress)
        recipe = search_recipe(folder, seed)
        result = run_search(recipe, folder / "merged", on_progress=on_progress)
    return {**result, "seconds": time.perf_counter() - started}


def new_base(seed: int) -> Net:
    """A small ViT with random weights."""
    return new_net(BASE, keyed_generator(seed, "base"))


def pretrain(out: Path, seed: int, on_progress: OnProgress) -> None:
    """The base, trained with its head on the pre-training half of the plain digits, on one thread."""
    recipe = _recipe(
        out, "digits:pretrain", seed, steps=800, lr=1e-3, head="linear", train_head=True
    )
    with one_thread():
        _train(new_base(seed), recipe, "pre-train", on_progress)


def fine_tune(folder: Path, variant: Variant, seed: int, on_progress: OnProgress) -> None:
    """One fine-tune of the base on one variant of the digits, with the base's head, frozen."""
    recipe = _recipe(
        folder / "models" / variant.name,
        f"digits:{variant.name}",
        seed,
        steps=variant.steps,
        lr=variant.lr,
        head=str(folder / "base" / HEAD_FILE),
    )
    _train(load_net(folder / "base"), recipe, f"fine-tune {variant.name}", on_progress)


def _recipe(out: Path, data: str, seed: int, **settings: Any) -> TrainingRecipe:
    shared = {"model": "a new ViT", "batch_size": 32, "save_every": 0}
    return TrainingRecipe.of(out=str(out), data=data, seed=seed, **shared, **settings)


def _train(net: Net, recipe: TrainingRecipe, name: str, on_progress: OnProgress) -> None:
    def show(progress: Progress) -> None:
        if progress.name == "steps":
            on_progress(replace(progress, name=name))

    finetune(net, load_task(recipe.data, net.inputs, recipe.seed), recipe, on_progress=show)


def search_recipe(folder: Path, seed: int) -> SearchRecipe:
    """The search over all rules of the paper."""
    models = [
        {"path": str(folder / "models" / v.name), "data": f"digits:{v.name}"} for v in VARIANTS
    ]
    return SearchRecipe.of(
        base=str(folder / "base"), models=models, scaling_coefs=LAMBDAS, seed=seed
    )
