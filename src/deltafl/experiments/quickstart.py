"""The whole story on scikit-learn's digits, offline: pre-train, fine-tune, merge, search, test
once.
"""

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from deltafl.merge.search_recipe import SearchRecipe
from deltafl.merge.search_run import run_search
from deltafl.models import HEAD_FILE, Net, load_net, new_net
from deltafl.pool import one_thread
from deltafl.progress import OnProgress, ignore
from deltafl.recipe_file import load_yaml
from deltafl.seeding import keyed_generator
from deltafl.tasks import load_task
from deltafl.training import TrainingRecipe, finetune

SETTINGS = load_yaml(Path(__file__).with_name("quickstart.yaml"))
VARIANTS = SETTINGS["variants"]


def run_quickstart(
    folder: Path, *, seed: int = 0, on_progress: OnProgress = ignore
) -> dict[str, Any]:
    """Write base, models/* and merged into `folder`; return the result for table and report.

    One thread: a model this small gains nothing from more, and sums then have one order.
    """
    started, base = time.perf_counter(), folder / "base"
    head = str(base / HEAD_FILE)
    with one_thread():
        pretrain(base, seed, on_progress)
        for name, own in VARIANTS.items():
            out, show = folder / "models" / name, _steps(f"fine-tune {name}", on_progress)
            _train(load_net(base), out, name, show, seed=seed, head=head, **own)
        result = run_search(search_recipe(folder, seed), folder / "merged", on_progress=on_progress)
    return {**result, "seconds": time.perf_counter() - started}


def new_base(seed: int) -> Net:
    """A small ViT with random weights."""
    return new_net(SETTINGS["base"], keyed_generator(seed, "base"))


def pretrain(out: Path, seed: int, on_progress: OnProgress) -> None:
    """The base, trained with its head on one half of the plain digits, on one thread."""
    with one_thread():
        show = _steps("pre-train", on_progress)
        _train(new_base(seed), out, "pretrain", show, seed=seed, **SETTINGS["pretraining"])


def _train(net: Net, out: Path, variant: str, show: OnProgress, **settings: object) -> None:
    settings |= SETTINGS["training"] | {"out": str(out), "data": f"digits:{variant}"}
    recipe = TrainingRecipe.of(**settings)
    finetune(net, load_task(recipe.data, net.inputs, recipe.seed), recipe, on_progress=show)


def _steps(name: str, on_progress: OnProgress) -> OnProgress:
    """Progress in steps, by another name."""
    return lambda p: on_progress(replace(p, name=name)) if p.name == "steps" else None


def search_recipe(folder: Path, seed: int) -> SearchRecipe:
    """The search over all rules of the paper."""
    models = [{"path": str(folder / "models" / v), "data": f"digits:{v}"} for v in VARIANTS]
    lambdas, base = SETTINGS["scaling_coefs"], str(folder / "base")
    return SearchRecipe.of(base=base, models=models, scaling_coefs=lambdas, seed=seed)
