"""`deltafl finetune` and `deltafl evaluate`."""

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

import click

from deltafl.cli.options import ManyValues, table
from deltafl.errors import DeltaflError

if TYPE_CHECKING:
    from torch import Tensor


@click.command()
@click.option(
    "--base",
    "--model",
    "base",
    help="Folder, hub id, module:attr, or a config.json for a new one.",
)
@click.option(
    "--data", help="The task: digits, a folder, a name (cifar100), hub:owner/name, module:attr."
)
@click.option(
    "--data-dir", help="The folder that holds tasks by name; without it they come from the hub."
)
@click.option("--out", help="The folder to write.")
@click.option("--lr", type=float, help="Peak learning rate. Default: 1e-5.")
@click.option(
    "--steps", type=int, help="Optimiser steps; or give --epochs. 0 writes the base with a head."
)
@click.option("--epochs", type=float, help="Passes over the training data.")
@click.option("--batch-size", type=int, help="Default: 128, over all processes together.")
@click.option("--weight-decay", type=float, help="Default: 0.1.")
@click.option(
    "--warmup", type=int, help="Steps of warm-up. Default: 10 % of the steps, at most 500."
)
@click.option("--schedule", help="cosine (default), constant, linear or step.")
@click.option("--optimizer", help="adamw (default) or sgd.")
@click.option("--momentum", type=float, help="For sgd. Default: 0.")
@click.option("--grad-clip", type=float, help="Largest gradient norm. Default: 1.")
@click.option("--label-smoothing", type=float, help="Default: 0.")
@click.option(
    "--head",
    help="ridge (default, closed form), linear (random), zero-shot (CLIP) or a head.safetensors.",
)
@click.option("--few-shot", type=int, help="Fit the ridge head on so many examples per class only.")
@click.option(
    "--templates",
    help="Prompts for the zero-shot head: a file, one on each line, {} for the class.",
)
@click.option(
    "--train-head", is_flag=True, default=None, help="Train the head too. Default: it is frozen."
)
@click.option("--mixed-precision", help="no (default) or bf16.")
@click.option(
    "--seed", type=int, help="Of batches, random heads and the validation split. Default: 0."
)
@click.option("--device", help="cpu, cuda, cuda:1. Default: the GPU where there is one.")
@click.option("--save-every", type=int, help="Steps between saved states. Default: 500.")
@click.option(
    "--config", help="A YAML file with the same names (batch_size: 64); options go before it."
)
@click.option("--resume", is_flag=True, help="Continue a run that was killed.")
@click.option("--overwrite", is_flag=True, help="Replace an existing output, or an unfinished run.")
@click.option("--quiet", is_flag=True, help="No progress, no summary.")
def finetune(
    config: str | None, resume: bool, overwrite: bool, quiet: bool, **options: Any
) -> None:
    """Fine-tune a model on a task. On several devices: accelerate launch -m deltafl finetune ...

    \b
    deltafl finetune --base B --data digits --epochs 5 --lr 1e-4 --out DIR
    """
    from deltafl.files import check_output
    from deltafl.models import load_encoder
    from deltafl.tasks.arrays import load_arrays
    from deltafl.training import FinetuneRecipe
    from deltafl.training import finetune as run

    held = _settings(config, options)
    recipe = FinetuneRecipe(**{f.name: held[f.name] for f in fields(FinetuneRecipe)})
    if problems := recipe.problems():
        raise DeltaflError(*problems)
    if not resume:
        check_output(held["out"], overwrite=overwrite)
    encoder = load_encoder(held["base"])
    size, channels = encoder.input.image_size, encoder.input.channels
    task = load_arrays(
        held["data"],
        image_size=size,
        channels=channels,
        seed=recipe.seed,
        data_dir=held["data_dir"],
    )
    quiet = quiet or int(os.environ.get("RANK", 0)) > 0
    with _progress_by_steps(task.name, quiet=quiet) as on_progress:
        done = run(
            encoder,
            task,
            recipe,
            held["out"],
            resume=resume,
            overwrite=overwrite,
            save_every=held["save_every"],
            device=held["device"],
            on_progress=on_progress,
        )
    if not quiet:
        accuracy, count = done.training["val_score"], done.training["val_examples"]
        click.echo(
            f"{done.out}: {done.training['num_steps']} steps, {accuracy:.2%} of {count} validation examples"
        )
    leave_processes()


@click.command(cls=ManyValues)
@click.option(
    "--models", multiple=True, required=True, help="Folders that finetune or merge wrote."
)
@click.option("--data", required=True, help="The task, as finetune takes it.")
@click.option(
    "--data-dir", help="The folder that holds tasks by name; without it they come from the hub."
)
@click.option("--split", type=click.Choice(["test", "val"]), default="test", show_default=True)
@click.option(
    "--head",
    help="A head.safetensors, or zero-shot (CLIP). Default: the one in each model's folder.",
)
@click.option(
    "--templates",
    help="Prompts for the zero-shot head: a file, one on each line, {} for the class.",
)
@click.option(
    "--seed",
    type=int,
    help="Of the validation split. Default: the one that the model was trained with.",
)
@click.option("--batch-size", type=click.IntRange(min=1), default=256, show_default=True)
@click.option(
    "--mixed-precision", type=click.Choice(["no", "bf16"]), default="no", show_default=True
)
@click.option("--device", help="cpu, cuda, cuda:1. Default: the GPU where there is one.")
@click.option(
    "--json",
    "json_file",
    help="Write the accuracies, and for each example if it was right, to this file.",
)
@click.option("--quiet", is_flag=True, help="Print nothing.")
def evaluate(
    models: tuple[str, ...],
    data: str,
    data_dir: str | None,
    split: str,
    head: str | None,
    templates: str | None,
    seed: int | None,
    batch_size: int,
    mixed_precision: str,
    device: str | None,
    json_file: str | None,
    quiet: bool,
) -> None:
    """Accuracy of models on a task.

    \b
    deltafl evaluate --models M1 M2 --data digits --split test
    """
    from deltafl.files import write_atomically
    from deltafl.models import load_encoder
    from deltafl.tasks.arrays import load_arrays
    from deltafl.training import evaluate as run

    rows = []
    for model in models:
        encoder = load_encoder(model)
        size, channels = encoder.input.image_size, encoder.input.channels
        chosen = _trained_seed(model) if seed is None else seed
        task = load_arrays(data, image_size=size, channels=channels, seed=chosen, data_dir=data_dir)
        found = run(
            encoder,
            task,
            split,
            head=head,
            templates=templates,
            batch_size=batch_size,
            device=device,
            mixed_precision=mixed_precision,
        )
        correct = found.correct.tolist()
        rows.append(
            {"model": model, "accuracy": found.accuracy, "n": len(correct), "correct": correct}
        )
    if json_file:
        content = {"data": data, "split": split, "results": rows}
        write_atomically(json_file, (json.dumps(content) + "\n").encode())
    if not quiet:
        cells = [[row["model"], f"{row['accuracy']:.2%}", str(row["n"])] for row in rows]
        click.echo(table(["model", f"{split} accuracy", "examples"], cells))


def _settings(config: str | None, options: dict[str, Any]) -> dict[str, Any]:
    """The YAML file with the options on top, every key checked.

    Raises:
        DeltaflError: one line for each mistake.
    """
    from pydantic import create_model

    from deltafl.recipes import Recipe, load_yaml, parse
    from deltafl.training import FinetuneRecipe

    hints = get_type_hints(FinetuneRecipe)
    recipe: dict[str, Any] = {f.name: (hints[f.name], f.default) for f in fields(FinetuneRecipe)}
    kind = create_model(
        "FinetuneConfig",
        __base__=Recipe,
        base=(str, ...),
        data=(str, ...),
        data_dir=(str | None, None),
        out=(str, ...),
        device=(str | None, None),
        save_every=(int, 500),
        **recipe,
    )
    held = load_yaml(config) if config else {}
    given = {key: value for key, value in options.items() if value is not None}
    if given.keys() & {"steps", "epochs"}:
        held = {key: value for key, value in held.items() if key not in ("steps", "epochs")}
    held |= given
    lacking = [f"name it with --{key}" for key in ("base", "data", "out") if key not in held]
    if lacking:
        raise DeltaflError(*(f"{text.split('--')[1]} is missing; {text}" for text in lacking))
    return parse(kind, held).model_dump()


def _trained_seed(model: str) -> int:
    """The seed in a model's training.json, which chose its validation split; 0 without one."""
    from deltafl.training import TRAINING_JSON

    file = Path(model) / TRAINING_JSON
    try:
        return int(json.loads(file.read_text())["seed"]) if file.is_file() else 0
    except (ValueError, KeyError, TypeError) as error:
        raise DeltaflError(f'"{file}" holds no seed ({error}); give one with --seed') from error


@contextmanager
def _progress_by_steps(
    label: str, *, quiet: bool
) -> Iterator[Callable[[int, int, "Tensor"], None]]:
    """A bar with loss, steps per second and remaining time on stderr; yields what `finetune` calls after a step."""
    if quiet or not sys.stderr.isatty():
        yield lambda done, total, loss: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[seen]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(label, total=None, seen="")

        def advance(done: int, total: int, loss: "Tensor") -> None:
            if bar.tasks[0].total is None:  # the steps of an earlier run are no part of the rate
                bar.reset(task, total=total, completed=done)
            bar.update(task, completed=done)
            if done % 10 == 0:  # reading the loss makes a GPU wait
                bar.update(
                    task, seen=f"{bar.tasks[0].speed or 0:.1f} steps/s, loss {loss.item():.3f}"
                )

        yield advance


def leave_processes() -> None:
    """Part from the other processes of an `accelerate launch`."""
    from accelerate import PartialState

    if PartialState().num_processes > 1:
        PartialState().destroy_process_group()
