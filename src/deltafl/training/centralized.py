"""The centralised baseline: the same loop, with a record, and a test of the best model."""

import json
import shutil
from pathlib import Path

from deltafl.files import check_output
from deltafl.models import Net
from deltafl.progress import OnProgress, ignore
from deltafl.tasks import Task
from deltafl.training.finetune import output_of, require_examples, training_facts, write_model
from deltafl.training.loop import Run, train
from deltafl.training.recipe import TrainingRecipe
from deltafl.training.record import FinishedRun, RunRecord, killed_at_start, write_json
from deltafl.training.state import read_state, require_same_config, run_config, write_state
from deltafl.training.step import scores


def centralize(
    net: Net,
    task: Task,
    recipe: TrainingRecipe,
    out: str | Path | None = None,
    *,
    resume: bool = False,
    on_progress: OnProgress = ignore,
) -> FinishedRun:
    """Train as `finetune` does, and leave in `out` config.yaml, record.jsonl, result.json and the
    best `model/` with its head, which is tested, once.

    The state is in OUT/state: killed at any moment the run goes on with `resume`, on a CPU to the
    same bits; a finished one is returned as it is.

    Raises:
        DeltaflError: a bad recipe, an output in the way, a run of another configuration, a diverged
        run.
    """
    out = output_of(recipe, out)
    require_examples(task, "train", "val", "test")
    config = run_config(net, task, recipe)
    state_file = out / "state" / "state.pt"
    going_on = resume and (out / "record.jsonl").is_file()
    if going_on:
        require_same_config(RunRecord.resume(out).config(), config, out)
        if (out / "result.json").is_file():
            return _finished(out)
    elif not (resume and killed_at_start(out)):
        check_output(out, overwrite=recipe.overwrite)
    run = Run(net, task, recipe, read_state(state_file, config) if going_on else None)
    main, record = run.processes.is_main_process, RunRecord(out)
    if main and not going_on:
        if out.exists():
            shutil.rmtree(out)
        RunRecord.create(out, config)
    if main:
        record.rewind(lambda row: bool(run.step) and row["epoch"] <= run.step // run.per_epoch)
    train(run, on_progress, lambda state: write_state(state_file, config, state), record.append)
    if main:
        test = scores(run.net, run.task, "test", autocast=recipe.autocast)
        rows = [row for row in record.rows() if row["event"] == "epoch"]
        result = {
            "title": f"{task.name}: centralised training",
            "metric": task.metric,
            "ratio_scaled": task.ratio_scaled,
            "test_score": test.double().mean().item(),
            "test_examples": len(test),
            "val_score": run.best.score,
            "val_examples": task.size("val"),
            "best_epoch": run.best.epoch,
            "epochs": len(rows),
            "steps": run.step,
            "stopped_early": run.step < run.total,
            "seconds": sum(row["seconds"] for row in rows),
            "config": config,
        }
        write_model(out / "model", run.net, training_facts(run, net, config), overwrite=True)
        write_json(out / "result.json", result)
    run.processes.wait_for_everyone()
    return _finished(out)


def _finished(out: Path) -> FinishedRun:
    shutil.rmtree(out / "state", ignore_errors=True)
    result = json.loads((out / "result.json").read_text())
    return FinishedRun(out, result, tuple(RunRecord(out).rows()))
