"""Fine-tuning: the loop, and the folder with a model that it leaves."""

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from deltafl.errors import DeltaflError
from deltafl.files import atomic_folder, check_output
from deltafl.models import Net
from deltafl.progress import OnProgress, ignore
from deltafl.tasks import Task
from deltafl.tasks.task import Split
from deltafl.training.loop import Run, train
from deltafl.training.recipe import TrainingRecipe
from deltafl.training.state import (
    read_state,
    require_same_config,
    run_config,
    state_path,
    write_state,
)

logger = logging.getLogger(__name__)

TRAINING_JSON = "training.json"


@dataclass(frozen=True)
class Finetuned:
    """What came out: the directory and the content of its training.json."""

    out: Path
    training: Mapping[str, Any]


def finetune(
    net: Net,
    task: Task,
    recipe: TrainingRecipe,
    out: str | Path | None = None,
    *,
    resume: bool = False,
    on_progress: OnProgress = ignore,
) -> Finetuned:
    """Train a copy of `net` and write the directory `out` (None: the recipe's), whole or not at
    all: the model with its head, and training.json. The recipe's `model` and `data` are what `net`
    and `task` were loaded by.

    While it trains the state is in `OUT.state` beside it; with `resume` a killed run continues from
    there, on a CPU to bit-identical weights, and a finished one is returned as it is.

    Raises:
        DeltaflError: bad recipe or head, an output or state that is in the way, a state of another
            configuration, a diverged run.
    """
    out = output_of(recipe, out)
    require_examples(task, "train", "val")
    config = run_config(net, task, recipe)
    if resume and (out / TRAINING_JSON).is_file():
        finished = json.loads((out / TRAINING_JSON).read_text())
        require_same_config(finished.get("config", {}), config, out)
        return Finetuned(out, finished)
    check_output(out, overwrite=recipe.overwrite)
    state_file = state_path(out)
    if state_file.exists() and not (resume or recipe.overwrite):
        raise DeltaflError(
            f'"{state_file}" holds an unfinished run; continue it with --resume, or start again '
            "with --overwrite"
        )
    run = Run(net, task, recipe, read_state(state_file, config) if resume else None)
    if run.step:
        logger.info("resumed from %s at step %d", state_file, run.step)
    train(run, on_progress, lambda state: write_state(state_file, config, state))
    training = training_facts(run, net, config)
    if run.processes.is_main_process:
        write_model(out, run.net, training, overwrite=recipe.overwrite)
        state_file.unlink(missing_ok=True)
    run.processes.wait_for_everyone()
    return Finetuned(out, training)


def output_of(recipe: TrainingRecipe, out: str | Path | None = None) -> Path:
    """`out`, or else the folder that the recipe names. Raises DeltaflError if there is none."""
    folder = out or recipe.out
    if folder is None:
        raise DeltaflError("no output; name a folder with --out")
    return Path(folder)


def require_examples(task: Task, *splits: Split) -> None:
    """Raise DeltaflError where a split of the task is empty."""
    if any(not task.size(split) for split in splits):
        counts = " and ".join(f"{task.size(split)} {split}" for split in splits)
        raise DeltaflError(f'task "{task.name}" has {counts} examples; all splits need some')


def training_facts(run: Run, base: Net, config: Mapping[str, Any]) -> dict[str, Any]:
    """The content of training.json: what a merge reads is at the top level."""
    recipe, task = run.recipe, run.task
    steps = run.best.epoch * run.per_epoch if recipe.eval_every else run.step
    return {
        **recipe.content(),
        "base": {"id": base.origin, "fingerprint": config["base_fingerprint"]},
        "task": task.name,
        "num_steps": min(steps, run.step),
        "num_examples": run.examples,
        "momentum": recipe.momentum if recipe.optimizer == "sgd" else None,
        "epochs": min(steps, run.step) / run.per_epoch,
        "warmup_steps": recipe.warmup_steps(run.examples),
        "metric": task.metric,
        "val_score": run.best.score,
        "val_examples": task.size("val"),
        "versions": {
            name: version(name) for name in ("deltafl", "torch", "transformers", "accelerate")
        },
        "config": dict(config),
    }


def write_model(
    out: Path, net: Net, training: Mapping[str, Any], *, overwrite: bool = False
) -> None:
    """A folder with a model and training.json, whole or not at all."""
    with atomic_folder(out, overwrite=overwrite) as folder:
        net.save(folder)
        (folder / TRAINING_JSON).write_text(json.dumps(training, indent=2) + "\n")
