"""The outer shell of `training.train_step`: devices, processes, resuming, and the directory that it leaves."""

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deltafl.algebra.tensors import device_named
from deltafl.errors import DeltaflError
from deltafl.files import atomic_folder, check_output
from deltafl.models import LoadedEncoder, save_encoder
from deltafl.models.flat import FlatModel
from deltafl.models.heads import HEAD_FILE, LinearHead, check_head, save_head
from deltafl.seeding import keyed_generator
from deltafl.tasks.arrays import Split, Task
from deltafl.training.evaluation import make_head
from deltafl.training.legacy import Batch, predict_correct, train_step
from deltafl.training.recipe import PRECISIONS, FinetuneRecipe
from deltafl.training.state import (
    read_state,
    require_same_config,
    run_config,
    state_path,
    write_state,
)
from deltafl.training.step import batch_ids, default_warmup, lr_at

logger = logging.getLogger(__name__)

TRAINING_JSON = "training.json"

OnProgress = Callable[[int, int, Tensor], None]
"""Told (steps done, steps in all, loss of the last one: a scalar still on the device)."""


@dataclass(frozen=True)
class Finetuned:
    """What came out: the directory and the content of its training.json."""

    out: Path
    training: Mapping[str, Any]


def finetune(
    encoder: LoadedEncoder,
    task: Task,
    recipe: FinetuneRecipe,
    out: str | Path,
    *,
    head: LinearHead | None = None,
    resume: bool = False,
    overwrite: bool = False,
    save_every: int = 500,
    device: str | None = None,
    on_progress: OnProgress = lambda done, total, loss: None,
) -> Finetuned:
    """Train a copy of `encoder` on `task.train` and write the directory `out`, whole or not at all.

    `out` holds the model (as `save_encoder` writes it), head.safetensors and training.json. `head` goes before
    `recipe.head`. Every `save_every` steps (0: never) the state goes to `OUT.state` beside it; with `resume` a killed
    run continues from there, on a CPU to bit-identical weights, and a finished one is returned as it is. `device`
    None: the GPU where there is one.

    Started by `accelerate launch` on P processes, each takes every P-th example of each batch and gradients are summed
    once per step: the result equals one process's up to rounding. Deviation: batch norm, if a model has it, sees its
    own process's part of a batch.

    Raises:
        DeltaflError: bad recipe or head, an output or state that is in the way, a state of another configuration, a
            diverged run.
    """
    out = Path(out)
    if problems := recipe.problems():
        raise DeltaflError(*problems)
    if not len(task.train) or not len(task.val):
        raise DeltaflError(
            f'task "{task.name}" has {len(task.train)} training and {len(task.val)} validation examples'
        )
    if head is not None:
        check_head(head, encoder.feature_dim, task.class_names, "given")
    config = run_config(encoder, task, recipe, head)
    if resume and (out / TRAINING_JSON).is_file():
        finished = json.loads((out / TRAINING_JSON).read_text())
        require_same_config(finished.get("config", {}), config, out)
        return Finetuned(out, finished)
    check_output(out, overwrite=overwrite)
    state_file = state_path(out)
    if state_file.exists() and not (resume or overwrite):
        raise DeltaflError(
            f'"{state_file}" holds an unfinished run; continue it with --resume, or start again with --overwrite'
        )
    state = read_state(state_file, config) if resume else None

    processes, where = join_processes(device)
    model = FlatModel(encoder.copy_to(where))
    if state is not None:
        weight, bias = state["head"]
        head = LinearHead(weight, bias, task.class_names, state.get("normalised", False))
    elif head is None:
        head = make_head(model, task, recipe)
    head = shared_head(head.to(where), processes.num_processes)
    head = head.trainable() if recipe.train_head else head
    optimiser = _optimiser([model.flat, *head.parameters()], recipe)
    start = 0
    if state is not None:
        start = state["step"]
        model.module.load_state_dict(state["module"])
        optimiser.load_state_dict(state["optimiser"])
        logger.info("resumed from %s at step %d", state_file, start)

    def save(done: int) -> None:
        check_finite(model, done)
        if processes.is_main_process:
            held = {"module": model.module.state_dict(), "optimiser": optimiser.state_dict()}
            frozen = head.frozen()
            held |= {"head": [frozen.weight, frozen.bias], "normalised": frozen.normalised}
            write_state(state_file, config, {"step": done, **held})

    for done, total, loss in training_steps(
        model, head, task.train, optimiser, recipe, start, processes
    ):
        if save_every and done % save_every == 0 and done < total:
            save(done)
        on_progress(done, total, loss)
    training = _training(model, head, task, recipe, config)
    if processes.is_main_process:
        with atomic_folder(out, overwrite=overwrite) as folder:
            save_encoder(model.encoder, folder)
            save_head(head, folder / HEAD_FILE)
            (folder / TRAINING_JSON).write_text(json.dumps(training, indent=2) + "\n")
        state_file.unlink(missing_ok=True)
    processes.wait_for_everyone()
    return Finetuned(out, training)


def join_processes(device: str | None) -> tuple[Any, str]:
    """accelerate's PartialState, once all processes are here, and the device of this one.

    Raises:
        DeltaflError: no such device.
    """
    from accelerate import PartialState

    if device is not None:
        device_named(device)
    processes = PartialState(cpu=device == "cpu")
    processes.wait_for_everyone()
    return processes, device if device is not None and processes.num_processes == 1 else str(
        processes.device
    )


def training_steps(
    model: FlatModel,
    head: LinearHead,
    split: Split,
    optimiser: torch.optim.Optimizer,
    recipe: FinetuneRecipe,
    start: int,
    processes: Any,
    *,
    change: Callable[[Tensor, int], Tensor] | None = None,
) -> Iterator[tuple[int, int, Tensor]]:
    """Train from step `start` to the end; (steps done, steps in all, loss) after each.

    `change` is given the images of a whole batch, uint8 (B, C, H, W), and the step, and returns as many.
    """
    from accelerate.utils import reduce

    train = Split(split.images.to(model.device), split.labels.to(model.device))
    total, warmup = _lengths(recipe, len(train))
    rank, world = processes.process_index, processes.num_processes
    for step in range(start, total):
        ids = batch_ids(len(train), recipe.batch_size, recipe.seed, step).to(model.device)
        images, labels = train.at(ids, model.device)
        if change is not None:
            images = change(images, step)
        with keyed_dropout(model.device, recipe.seed, step, rank):
            loss = train_step(
                model,
                head,
                Batch(images[rank::world], labels[rank::world], total=len(ids)),
                optimiser,
                lr=lr_at(step, total, warmup, recipe.lr, recipe.schedule),
                grad_clip=recipe.grad_clip,
                label_smoothing=recipe.label_smoothing,
                autocast=PRECISIONS[recipe.mixed_precision],
                reduce=(lambda t: reduce(t, "sum")) if world > 1 else None,  # pyright: ignore[reportArgumentType]
            )
        yield step + 1, total, loss


def _lengths(recipe: FinetuneRecipe, num_examples: int) -> tuple[int, int]:
    """Steps in all, and of warm-up."""
    total = recipe.num_steps(num_examples)
    return total, default_warmup(total) if recipe.warmup is None else recipe.warmup


def _optimiser(parameters: list[Tensor], recipe: FinetuneRecipe) -> torch.optim.Optimizer:
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(
            parameters, recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay
        )
    return torch.optim.AdamW(parameters, recipe.lr, weight_decay=recipe.weight_decay, fused=True)


def shared_head(head: LinearHead, num_processes: int) -> LinearHead:
    """The main process's head: fitted apart, two processes' heads may differ in their last bits."""
    if num_processes == 1:
        return head
    from accelerate.utils import broadcast

    weight, bias = broadcast([head.weight.contiguous(), head.bias])  # pyright: ignore[reportArgumentType]
    return replace(head, weight=weight, bias=bias)


@contextmanager
def keyed_dropout(device: torch.device, seed: int, step: int, rank: int) -> Iterator[None]:
    """Dropout as a function of (seed, step, rank), so that a resumed run draws the same; global state is kept.

    A federated client has its round and its own number for the last two.
    """
    key = keyed_generator(seed, "dropout", step, rank).initial_seed()
    cuda = device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if cuda else []):
        torch.random.default_generator.manual_seed(key)
        if cuda:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(key)
        yield


def check_finite(model: FlatModel, step: int) -> None:
    """Raise DeltaflError if a weight is NaN or Inf."""
    if not torch.isfinite(model.flat.detach()).all():
        raise DeltaflError(
            f"training diverged: weights are not finite by step {step}; use a smaller --lr"
        )


def _training(
    model: FlatModel,
    head: LinearHead,
    task: Task,
    recipe: FinetuneRecipe,
    config: Mapping[str, Any],
) -> dict[str, Any]:
    """The content of training.json, with the validation accuracy; what a merge reads is at the top level."""
    num_steps, warmup = _lengths(recipe, len(task.train))
    check_finite(model, num_steps)
    correct = predict_correct(model, head, task.val, autocast=PRECISIONS[recipe.mixed_precision])
    settings = asdict(recipe)
    del settings["steps"], settings["warmup"]
    return {
        "base": {"id": config["base"], "fingerprint": config["base_fingerprint"]},
        "task": task.name,
        "num_steps": num_steps,
        "num_examples": len(task.train),
        "num_classes": len(task.class_names),
        **settings,
        "momentum": recipe.momentum if recipe.optimizer == "sgd" else None,
        "epochs": num_steps * recipe.batch_size / len(task.train)
        if recipe.epochs is None
        else recipe.epochs,
        "warmup_steps": warmup,
        "val_score": correct.double().mean().item(),
        "val_examples": len(correct),
        "versions": {
            name: version(name) for name in ("deltafl", "torch", "transformers", "accelerate")
        },
        "config": dict(config),
    }
