"""`deltafl centralized`."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from deltafl.cli.command import quiet, recipe_command, resume
from deltafl.cli.progress import drawn_progress
from deltafl.cli.text import as_score, table
from deltafl.cli.train import leave_processes
from deltafl.files import check_output, write_files
from deltafl.models import load_net
from deltafl.progress import Progress
from deltafl.report import page_files, run_page
from deltafl.tasks import load_task
from deltafl.training import CentralizedRecipe, centralize
from deltafl.training.finetune import output_of
from deltafl.training.tensorboard import check_installed, write_scalars


@recipe_command(CentralizedRecipe)
@click.option("--tensorboard", is_flag=True, help="Write OUT/metrics for TensorBoard too.")
@resume
@quiet
def centralized(recipe: CentralizedRecipe, tensorboard: bool, resume: bool, quiet: bool) -> None:
    """Train on all samples in one place: SGDM, the best epoch on validation, tested once.

    \b
    deltafl centralized --model facebook/dino-vits16 --data cifar100 --epochs 50 --lr 0.001 --out DIR
    """
    out = output_of(recipe)
    if tensorboard:
        check_installed()
    if not resume:
        check_output(out, overwrite=recipe.overwrite)
    main = int(os.environ.get("RANK", 0)) == 0
    quiet = quiet or not main
    net = load_net(recipe.model)
    task = load_task(recipe.data, net.inputs, recipe.seed)
    with drawn_progress(quiet=quiet) as show:

        def tell(progress: Progress) -> None:
            show(progress)
            if progress.name == "epochs" and not quiet:
                click.echo(_line(progress, task.ratio_scaled))

        done = centralize(net, task, recipe, resume=resume, on_progress=tell)
    if main:
        write_report(done.out, done.result, done.rows)
        if tensorboard:
            write_scalars(done.out)
    if not quiet:
        click.echo(summary(done.result, done.out))
    leave_processes()


def write_report(out: Path, result: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> None:
    """OUT/report.html and OUT/figure.png."""
    write_files(out, page_files(run_page(result, rows)))


def summary(result: Mapping[str, Any], out: Path) -> str:
    """What came out, in a small table."""
    early = ", stopped early" if result["stopped_early"] else ""
    test, val = (as_score(result[f"{s}_score"], result["ratio_scaled"]) for s in ("test", "val"))
    facts = [
        (f"test {result['metric']}", f"{test} of {result['test_examples']}"),
        (f"validation {result['metric']}", f"{val} after epoch {result['best_epoch']}"),
        ("epochs", f"{result['epochs']}{early}"),
    ]
    heading = table(("centralised training", ""), facts)
    return f"{heading}\nmodel: {out / 'model'}\nreport: {out / 'report.html'}"


def _line(progress: Progress, ratio_scaled: bool) -> str:
    numbers = {name: float(value) for name, value in progress.numbers.items()}
    said = [f"loss {numbers['train_loss']:.4f}"] if "train_loss" in numbers else []
    if "val_score" in numbers:
        said.append(f"validation {as_score(numbers['val_score'], ratio_scaled)}")
    return f"epoch {progress.done}/{progress.total}: {', '.join(said)}"
