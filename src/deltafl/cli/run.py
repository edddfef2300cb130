"""What the commands that train share: what comes before a run, and what after it."""

from collections.abc import Callable

import click
import yaml

from deltafl.cli.command import flag
from deltafl.cli.results import page_text
from deltafl.files import check_output, write_files
from deltafl.models import Net, load_net
from deltafl.recipes import Recipe
from deltafl.report import page_files, run_page
from deltafl.tasks import Task, load_task
from deltafl.training import FinishedRun
from deltafl.training.recipe import RunRecipe
from deltafl.training.tensorboard import METRICS, check_installed, write_rows


def prepared(
    recipe: RunRecipe, check: Callable[[Task], object] = lambda task: None
) -> tuple[Net, Task]:
    """The model and the task of a recipe whose output may be written; with --dry-run `check` is
    called, and the command ends.

    Raises:
        DeltaflError: no output, one that is in the way, no such model or data.
    """
    out = recipe.output
    if flag("tensorboard"):
        check_installed()
    if not flag("resume"):
        check_output(out, overwrite=recipe.overwrite)
    net = load_net(recipe.model)
    task = load_task(recipe.data, net.inputs, recipe.seed)
    if flag("dry_run"):
        check(task)
        show_settings(recipe)
    return net, task


def show_settings(recipe: Recipe) -> None:
    """Print all settings as a file, and end the command."""
    click.echo(yaml.safe_dump(recipe.resolved(), sort_keys=False, allow_unicode=True).rstrip())
    click.get_current_context().exit()


def finish(run: FinishedRun) -> None:
    """Write the report into the folder of a run, and say what came out."""
    page = run_page(run.result, run.rows)
    write_files(run.out, page_files(page))
    if flag("tensorboard"):
        write_rows(run.rows, run.out / METRICS)
    click.echo(page_text(page, out=run.out))
