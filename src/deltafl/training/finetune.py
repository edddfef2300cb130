"""Fine-tuning, which leaves a folder with a model, and the centralised baseline, which leaves a
run: its record, its result, and the best model, tested.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path

from accelerate import PartialState

from deltafl.errors import DeltaflError
from deltafl.files import atomic_folder, check_output
from deltafl.models import Net
from deltafl.progress import OnProgress, ignore
from deltafl.tasks import Task
from deltafl.tasks.task import require_examples
from deltafl.training.loop import Run, train
from deltafl.training.recipe import TrainingRecipe
from deltafl.training.record import (
    FinishedRun,
    Row,
    RunRecord,
    read_rows,
    read_state,
    require_same_config,
    run_config,
    write_json,
    write_state,
)
from deltafl.training.step import scores

TRAINING_JSON = "training.json"


@dataclass(frozen=True)
class Finetuned:
    """What came out: the directory and the content of its training.json."""

    out: Path
    training: Row


def finetune(
    net: Net,
    task: Task,
    recipe: TrainingRecipe,
    *,
    resume: bool = False,
    on_progress: OnProgress = ignore,
) -> Finetuned:
    """Train a copy of `net` and write the directory `recipe.out`, whole or not at all: the model
    with its head, and training.json. The recipe's `model` and `data` are what `net` and `task` were
    loaded by.

    While it trains the state is in `OUT.state` beside it; with `resume` a killed run continues from
    there, on a CPU to bit-identical weights, and a finished one is returned as it is.

    Raises:
        DeltaflError: bad recipe or head, an output or state that is in the way, a state of another
            configuration, a diverged run.
    """
    out = recipe.output
    require_examples(task, "train", "val")
    config, state = run_config(net, task, recipe), out.with_name(f"{out.name}.state")
    return Finetuned(out, _trained(net, task, recipe, config, out, state, resume, on_progress))


def centralize(
    net: Net,
    task: Task,
    recipe: TrainingRecipe,
    *,
    resume: bool = False,
    on_progress: OnProgress = ignore,
) -> FinishedRun:
    """Train as `finetune` does, and leave in `recipe.out` config.yaml, record.jsonl, result.json
    and the best `model/` with its head, which is tested, once.

    The state is in OUT/state: killed at any moment the run goes on with `resume`, on a CPU to the
    same bits; a finished one is returned as it is.

    Raises:
        DeltaflError: a bad recipe, an output in the way, a run of another configuration, a diverged
        run.
    """
    out, record = recipe.output, RunRecord(recipe.output)
    require_examples(task, "train", "val", "test")
    config = run_config(net, task, recipe)
    begun = record.begun(config, resume=resume, overwrite=recipe.overwrite)
    if begun and record.is_finished:
        return record.finished()
    state = out / "state" / "state.pt"
    training = _trained(net, task, recipe, config, out / "model", state, begun, on_progress, record)
    if PartialState().is_main_process:
        rows = [row for row in read_rows(record.path) if row["event"] == "epoch"]
        steps = sum(row["step"] for row in rows[-1:])
        shared = ("test_score", "test_examples", "val_score", "val_examples")
        result = {
            "title": f"{task.name}: centralised training",
            "metric": task.metric,
            "ratio_scaled": task.ratio_scaled,
            **{key: training[key] for key in shared},
            "best_epoch": math.ceil(training["epochs"]),
            "epochs": len(rows),
            "steps": steps,
            "stopped_early": steps < recipe.num_steps(task.size("train")),
            "seconds": sum(row["seconds"] for row in rows),
            "config": config,
        }
        write_json(out / "result.json", result)
    PartialState().wait_for_everyone()
    return record.finished()


def _trained(
    net: Net,
    task: Task,
    recipe: TrainingRecipe,
    config: Row,
    out: Path,
    state: Path,
    resume: bool,
    on_progress: OnProgress,
    record: RunRecord | None = None,
) -> Row:
    """training.json of the model in `out`, which is trained and written unless it is there.

    record: of the whole run, which a new one begins in place of an older one when the head is
    ready; the model is then tested.
    """
    file = out / TRAINING_JSON
    if resume and file.is_file():
        finished = json.loads(file.read_text())
        require_same_config(finished.get("config", {}), config, out)
        state.unlink(missing_ok=True)
        return finished
    check_output(out, overwrite=recipe.overwrite)
    if state.exists() and not (resume or recipe.overwrite):
        raise DeltaflError(
            f'"{state}" holds an unfinished run; continue it with --resume, or start again '
            "with --overwrite"
        )
    run = Run(net, task, recipe, read_state(state, config) if resume else None)
    main = run.processes.is_main_process
    if record is not None and main:
        if not resume:
            with atomic_folder(record.folder, overwrite=recipe.overwrite) as folder:
                RunRecord.create(folder, config)
        record.rewind("step", run.step)
    append = None if record is None else record.append
    train(run, on_progress, partial(write_state, state, config), append)
    if main:
        training = _facts(run, net, config)
        if record is not None:
            test = scores(run.net, run.task, "test", autocast=recipe.autocast)
            training["test_score"] = test.double().mean().item()
            training["test_examples"] = len(test)
        write_model(out, run.net, training, overwrite=recipe.overwrite)
    run.processes.wait_for_everyone()
    state.unlink(missing_ok=True)
    return json.loads(file.read_text())


def _facts(run: Run, base: Net, config: Row) -> Row:
    """The content of training.json: what a merge reads is at the top level."""
    recipe, task = run.recipe, run.task
    steps = min(run.best.after * run.per_epoch, run.step)
    return {
        **recipe.content(),
        "base": {"id": base.origin, "fingerprint": config["base_fingerprint"]},
        "task": task.name,
        "num_steps": steps,
        "num_examples": run.examples,
        "momentum": recipe.momentum if recipe.optimizer == "sgd" else None,
        "epochs": steps / run.per_epoch,
        "warmup_steps": recipe.warmup_steps(run.examples),
        "metric": task.metric,
        "val_score": run.best.score,
        "val_examples": task.size("val"),
        "versions": {
            name: version(name) for name in ("deltafl", "torch", "transformers", "accelerate")
        },
        "config": config,
    }


def write_model(
    out: Path, net: Net, training: Mapping[str, object], *, overwrite: bool = True
) -> None:
    """A folder with a model and training.json, whole or not at all."""
    with atomic_folder(out, overwrite=overwrite) as folder:
        net.save(folder)
        write_json(folder / TRAINING_JSON, training)
