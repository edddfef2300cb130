"""What the commands that train share: what comes before a run, and what after it."""

import os
from collections.abc import Mapping
from typing import Any

import click
import yaml

from deltafl.cli.results import as_score, as_text
from deltafl.errors import DeltaflError
from deltafl.federated.recipe import ClientsRecipe
from deltafl.files import check_output, write_files
from deltafl.models import Net, load_net
from deltafl.recipes import Recipe
from deltafl.report import Column, Table, page_files, run_page
from deltafl.sizes import as_bytes
from deltafl.tasks import Task, load_task
from deltafl.training import TrainingRecipe
from deltafl.training.record import FinishedRun
from deltafl.training.tensorboard import check_installed, write_scalars

is_main = int(os.environ.get("RANK", 0)) == 0
"""Whether this is the process of an `accelerate launch` that speaks and writes."""


def prepared(
    recipe: TrainingRecipe | ClientsRecipe,
    *,
    resume: bool,
    dry_run: bool,
    tensorboard: bool = False,
) -> tuple[Net, Task]:
    """The model and the task of a recipe whose output may be written.

    Raises:
        DeltaflError: no output, one that is in the way, no such model or data.
    """
    if recipe.out is None:
        raise DeltaflError("no output; name a folder with --out")
    if tensorboard:
        check_installed()
    if not resume:
        check_output(recipe.out, overwrite=recipe.overwrite)
    net = load_net(recipe.model)
    task = load_task(recipe.data, net.inputs, recipe.seed)
    if dry_run:
        show_settings(recipe)
    return net, task


def show_settings(recipe: Recipe) -> None:
    """Print all settings as a file, and end the command."""
    click.echo(yaml.safe_dump(recipe.resolved(), sort_keys=False, allow_unicode=True).rstrip())
    click.get_current_context().exit()


def finish(run: FinishedRun, *, quiet: bool, tensorboard: bool) -> None:
    """Write the report into the folder of a run, and say what came out."""
    write_files(run.out, page_files(run_page(run.result, run.rows)))
    if tensorboard:
        write_scalars(run.out)
    if not quiet:
        facts = [{"fact": fact, "value": value} for fact, value in _facts(run.result).items()]
        columns = {"fact": Column(run.result["title"]), "value": Column("", str)}
        click.echo(as_text(Table(facts, columns)))
        click.echo(f"model: {run.out / 'model'}\nreport: {run.out / 'report.html'}")


def _facts(result: Mapping[str, Any]) -> dict[str, str]:
    """The result in a few words."""
    unit, metric = "round" if "best_round" in result else "epoch", result["metric"]
    test, val = (as_score(result[f"{s}_score"], result["ratio_scaled"]) for s in ("test", "val"))
    found = {
        f"test {metric}": f"{test} of {result['test_examples']}",
        f"validation {metric}": f"{val} after {unit} {result[f'best_{unit}']}",
        f"{unit}s": f"{result[f'{unit}s']}{', stopped early' * result.get('stopped_early', False)}",
    }
    if unit == "round":
        up, down = (as_bytes(result[f"setup_bytes_{way}"]) for way in ("up", "down"))
        found |= {
            "sent by clients": as_bytes(result["bytes_up_total"]),
            "sent by the server": as_bytes(result["bytes_down_total"]),
            "in step 0": f"{up} up, {down} down",
            "updates left out": str(result["failed_updates"]),
        }
    return found
