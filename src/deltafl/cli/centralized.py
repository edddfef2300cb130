"""`deltafl centralized`."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import click

from deltafl.cli.options import progress_by_stage, table
from deltafl.cli.settings import EXTRA as RUN_SETTINGS
from deltafl.cli.settings import (
    load_model_and_task,
    read_settings,
    recipe_options,
    task_options,
)
from deltafl.errors import DeltaflError
from deltafl.training.centralized_recipe import CentralizedRecipe

HELP = {
    "epochs": "Passes over the training data.",
    "lr": "Peak learning rate.",
    "momentum": "Of SGD.",
    "nesterov": "Nesterov momentum.",
    "weight_decay": "Of SGD.",
    "batch_size": "Over all processes together.",
    "lr_schedule": "cosine, constant, linear, or step (a tenth after half, and after three quarters, of the steps).",
    "warmup": "Steps of warm-up.",
    "augment": "none, flip or crop_flip, of training images only.",
    "grad_clip": "Largest gradient norm. Default: no clipping.",
    "label_smoothing": "Of the training loss.",
    "head": "ridge, probe (logistic regression), linear (random), zero-shot (CLIP) or a head.safetensors.",
    "few_shot": "Fit the ridge head on so many examples per class only.",
    "templates": "Prompts for the zero-shot head: a file, one on each line, {} for the class.",
    "train_head": "Train the head too. Default: it is frozen.",
    "patience": "Epochs without a gain on validation after which to stop. Default: never.",
    "mixed_precision": "no or bf16.",
    "seed": "Of everything that is random.",
}
EXTRA = RUN_SETTINGS | {"save_every": (int, 500)}


@click.command()
@task_options
@click.option("--out", help="The folder to write.")
@recipe_options(CentralizedRecipe, HELP)
@click.option(
    "--save-every",
    type=int,
    help="Steps between saved states, beside that of each epoch. Default: 500.",
)
@click.option("--tensorboard", is_flag=True, help="Write OUT/metrics for TensorBoard too.")
@click.option("--resume", is_flag=True, help="Continue a run that was killed.")
@click.option("--overwrite", is_flag=True, help="Replace an existing output.")
@click.option("--quiet", is_flag=True, help="No progress, no summary.")
def centralized(
    config: str | None,
    tensorboard: bool,
    resume: bool,
    overwrite: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Train on all samples in one place: SGDM, the best epoch on validation, tested once.

    \b
    deltafl centralized --model facebook/dino-vits16 --data cifar100 --epochs 50 --lr 0.001 --out DIR
    """
    from deltafl.cli.train import leave_processes
    from deltafl.files import check_output
    from deltafl.training.centralized import centralize
    from deltafl.training.tensorboard import check_installed, write_scalars

    held = read_settings(CentralizedRecipe, config, options, EXTRA)
    recipe = CentralizedRecipe(**{f.name: held[f.name] for f in fields(CentralizedRecipe)})
    if problems := recipe.problems():
        raise DeltaflError(*problems)
    if tensorboard:
        check_installed()
    if not resume:
        check_output(held["out"], overwrite=overwrite)
    main = int(os.environ.get("RANK", 0)) == 0
    quiet = quiet or not main
    encoder, task = load_model_and_task(held, recipe.seed)
    with progress_by_stage(quiet=quiet) as show:
        done = centralize(
            encoder,
            task,
            recipe,
            held["out"],
            resume=resume,
            overwrite=overwrite,
            save_every=held["save_every"],
            device=held["device"],
            on_step=lambda step, total: show("steps", step, total),
            on_epoch=lambda row: None if quiet else click.echo(_line(row, recipe.epochs)),
        )
    if main:
        write_report(done.out, done.result, done.rows)
        if tensorboard:
            write_scalars(done.out)
    if not quiet:
        click.echo(summary(done.result, done.out))
    leave_processes()


def write_report(out: Path, result: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> None:
    """OUT/report.html and OUT/figure.png."""
    from deltafl.files import write_files
    from deltafl.report import page_files, run_page

    write_files(out, page_files(run_page(result, rows)))


def summary(result: Mapping[str, Any], out: Path) -> str:
    """What came out, in a small table."""
    early = ", stopped early" if result["stopped_early"] else ""
    facts = [
        ("test accuracy", f"{result['test_score']:.2%} of {result['test_examples']}"),
        ("validation accuracy", f"{result['val_score']:.2%} after epoch {result['best_epoch']}"),
        ("epochs", f"{result['epochs']}{early}"),
    ]
    return f"{table(('centralised training', ''), facts)}\nmodel: {out / 'model'}\nreport: {out / 'report.html'}"


def _line(row: Mapping[str, Any], epochs: int) -> str:
    told = "" if row["epoch"] == 0 else f"loss {row['train_loss']:.4f}, "
    return f"epoch {row['epoch']}/{epochs}: {told}validation {row['val_score']:.2%}"
