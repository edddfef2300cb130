"""Centralised training, what federated runs are compared with: SGDM on all samples, validated after every epoch."""

import json
import math
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deltafl.errors import DeltaflError
from deltafl.federated.client import augmented
from deltafl.federated.recipe import FederatedRecipe
from deltafl.federated.setup import make_head
from deltafl.files import check_output
from deltafl.models import LoadedEncoder
from deltafl.models.flat import FlatModel
from deltafl.models.heads import LinearHead
from deltafl.seeding import keyed_generator
from deltafl.tasks.arrays import Split, Task
from deltafl.training.centralized_best import Progress, write_best
from deltafl.training.centralized_recipe import CentralizedRecipe
from deltafl.training.finetune import check_finite, join_processes, shared_head, training_steps
from deltafl.training.legacy import predict_correct
from deltafl.training.recipe import PRECISIONS
from deltafl.training.record import RunRecord, killed_at_start
from deltafl.training.state import read_state, require_same_config, run_config, write_state
from deltafl.training.step import lr_at


@dataclass(frozen=True)
class CentralizedRun:
    """What came out: the folder, the result (as in result.json) and every row of the record."""

    out: Path
    result: Mapping[str, Any]
    rows: tuple[Mapping[str, Any], ...]


def centralize(
    encoder: LoadedEncoder,
    task: Task,
    recipe: CentralizedRecipe,
    out: str | Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    save_every: int = 500,
    device: str | None = None,
    on_step: Callable[[int, int], None] = lambda done, total: None,
    on_epoch: Callable[[Mapping[str, Any]], None] = lambda row: None,
) -> CentralizedRun:
    """Train, and leave in `out` config.yaml, record.jsonl, result.json and the best `model/` with its head.

    Validation before the first epoch and after each; of equal accuracies the first is the best; its model is tested,
    once. The state is saved after each epoch and every `save_every` steps (0: after epochs only): killed at any moment
    the run goes on with `resume`, on a CPU to the same bits; a finished one is returned as it is. `device` None: the
    GPU where there is one. Under `accelerate launch` processes share each batch, as in `finetune`.

    Raises:
        DeltaflError: a bad recipe, an output in the way, a run of another configuration, a diverged run.
    """
    out = Path(out)
    if problems := recipe.problems():
        raise DeltaflError(*problems)
    if not (len(task.train) and len(task.val) and len(task.test)):
        counts = f"{len(task.train)} training, {len(task.val)} validation and {len(task.test)} test examples"
        raise DeltaflError(f'task "{task.name}" has {counts}; all three are needed')
    config = json.loads(json.dumps(run_config(encoder, task, recipe, None)))
    state_file = out / "state" / "state.pt"
    going_on = resume and (out / "record.jsonl").is_file()
    if going_on:
        require_same_config(RunRecord.resume(out).config(), config, out)
        if (out / "result.json").is_file():
            return _finished(out)
    elif not (resume and killed_at_start(out)):
        check_output(out, overwrite=overwrite)
    state = read_state(state_file, config) if going_on else None

    processes, where = join_processes(device)
    if processes.is_main_process and not going_on:
        if out.exists():
            shutil.rmtree(out)
        RunRecord.create(out, config)
    record = RunRecord(out) if processes.is_main_process else None
    model, count = FlatModel(encoder.copy_to(where)), processes.num_processes
    if state is None:
        head = _head(model, task, recipe)
    else:
        weight, bias = state["head"]
        head = LinearHead(weight, bias, task.class_names, state.get("normalised", False))
    head = shared_head(head.frozen().to(where), count)
    head = head.trainable() if recipe.train_head else head
    optimiser = torch.optim.SGD(
        [model.flat, *head.parameters()],
        recipe.lr,
        momentum=recipe.momentum,
        weight_decay=recipe.weight_decay,
        nesterov=recipe.nesterov,
    )
    if state is not None:
        model.module.load_state_dict(state["module"])
        optimiser.load_state_dict(state["optimiser"])
    progress = Progress(0, torch.zeros(()), {}, 0, -math.inf, 0) if state is None else _read(state)
    progress = replace(progress, loss=progress.loss.to(model.device))
    per_epoch = math.ceil(len(task.train) / recipe.batch_size)
    if record is not None:
        record.rewind(lambda row: state is not None and row["epoch"] <= progress.step // per_epoch)

    def validated(progress: Progress, epoch: int) -> tuple[Progress, float]:
        check_finite(model, progress.step)
        accuracy = _accuracy(model, head, task.val, recipe, count)
        if accuracy > progress.best_score:
            kept = {n: t.clone() for n, t in model.module.state_dict().items()}
            best = {"module": kept, "head": [t.detach().clone() for t in (head.weight, head.bias)]}
            best["normalised"] = head.normalised
            return replace(
                progress, best=best, best_epoch=epoch, best_score=accuracy, waited=0
            ), accuracy
        return replace(progress, waited=progress.waited + 1), accuracy

    def tell(row: Mapping[str, Any]) -> None:
        if record is not None:
            record.append(row)
        on_epoch(row)

    def save(progress: Progress) -> None:
        check_finite(model, progress.step)
        if processes.is_main_process:
            own = {"module": model.module.state_dict(), "optimiser": optimiser.state_dict()}
            frozen = head.frozen()
            own |= {"head": [frozen.weight, frozen.bias], "normalised": frozen.normalised}
            write_state(state_file, config, {**vars(progress), **own})

    if state is None:
        progress, accuracy = validated(progress, 0)
        tell(
            {
                "event": "start",
                "epoch": 0,
                "val_score": accuracy,
                "parameters": model.flat.numel(),
            }
        )
    started = time.perf_counter()
    exhausted = recipe.patience is not None and progress.waited >= recipe.patience
    steps = training_steps(
        model,
        head,
        task.train,
        optimiser,
        recipe.finetuning(),
        progress.step,
        processes,
        change=_change(recipe),
    )
    for done, total, loss in () if exhausted else steps:
        epoch, position = divmod(done - 1, per_epoch)
        size = min(recipe.batch_size, len(task.train) - position * recipe.batch_size)
        progress = replace(progress, step=done, loss=progress.loss + loss * size)
        if position == per_epoch - 1:
            mean = progress.loss.item() / len(task.train)
            progress, accuracy = validated(
                replace(progress, loss=torch.zeros_like(progress.loss)), epoch + 1
            )
            rate = lr_at(done - 1, total, recipe.warmup, recipe.lr, recipe.lr_schedule)
            seconds = time.perf_counter() - started
            tell({"event": "epoch", "epoch": epoch + 1, "step": done, "lr": rate, "train_loss": mean,
                  "val_score": accuracy, "seconds": seconds})  # fmt: skip
            started = time.perf_counter()
        if position == per_epoch - 1 or (save_every and done % save_every == 0):
            save(progress)
        on_step(done, total)
        if recipe.patience is not None and progress.waited >= recipe.patience:
            break
    if record is not None:
        write_best(progress, model, task, recipe, record, config)
    processes.wait_for_everyone()
    return _finished(out)


def _finished(out: Path) -> CentralizedRun:
    shutil.rmtree(out / "state", ignore_errors=True)
    return CentralizedRun(
        out, json.loads((out / "result.json").read_text()), tuple(RunRecord(out).rows())
    )


def _head(model: FlatModel, task: Task, recipe: CentralizedRecipe) -> LinearHead:
    """The head of a federated run whose one client holds all samples."""
    alone = FederatedRecipe(
        head=recipe.head,
        few_shot=recipe.few_shot,
        templates=recipe.templates,
        mixed_precision=recipe.mixed_precision,
        seed=recipe.seed,
    )
    return make_head(model, task, [torch.arange(len(task.train))], alone)


def _read(state: Mapping[str, Any]) -> Progress:
    return Progress(**{f.name: state[f.name] for f in fields(Progress)})


def _change(recipe: CentralizedRecipe) -> Callable[[Tensor, int], Tensor] | None:
    """Augmentation of the batch at a step, keyed by it; None where there is none."""
    if recipe.augment == "none":
        return None
    return lambda images, step: augmented(
        images, recipe.augment, keyed_generator(recipe.seed, "augment", step)
    )


def _accuracy(
    model: FlatModel, head: LinearHead, split: Split, recipe: CentralizedRecipe, count: int
) -> float:
    """The main process's, so that all of `count` processes stop after the same epoch."""
    correct = predict_correct(model, head, split, autocast=PRECISIONS[recipe.mixed_precision])
    mean = correct.double().mean()
    if count > 1:
        from accelerate.utils import broadcast

        mean = broadcast(mean.to(model.device)).cpu()  # pyright: ignore[reportAttributeAccessIssue]
    return mean.item()
