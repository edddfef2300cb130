"""`deltafl merge`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from deltafl.checkpoints.readahead import reading_ahead
from deltafl.cli.command import flag, recipe_command
from deltafl.cli.progress import drawn_progress
from deltafl.cli.push import push_merged, show_push
from deltafl.errors import DeltaflError
from deltafl.files import check_output
from deltafl.merge.mergekit import translate
from deltafl.merge.plan import plan_merge
from deltafl.merge.recipe import MergeRecipe
from deltafl.recipe_file import load_yaml
from deltafl.recipes import read_recipe
from deltafl.rendering import render
from deltafl.rules.rule import ExampleRule


def read_merge(config: str | None, settings: Mapping[str, Any]) -> MergeRecipe:
    """The recipe of a file, ours or mergekit's; of the latter, what makes no difference is noted on
    stderr.
    """
    data = load_yaml(config) if config else {}
    if "merge_method" in data:
        data, notes = translate(data)
        for note in notes:
            click.echo(f"note: {note}", err=True)
    return read_recipe(MergeRecipe, data, settings)


@recipe_command(MergeRecipe, "dry_run", "quiet", argument="config", read=read_merge)
def merge_command(recipe: MergeRecipe) -> None:
    """Merge fine-tuned models of one base: theta = theta0 + server_lr * rule(deltas).

    \b
    deltafl merge --base B --models M1 M2 --method fedgma --rho 0.6 --scaling-coef 0.3 --out DIR
    deltafl merge RECIPE.yaml              ours, or mergekit's
    """
    merge_and_show(recipe)


def merge_and_show(recipe: MergeRecipe) -> None:
    """Plan a merge, and do it unless this is a dry run."""
    plan = plan_merge(recipe)
    if flag("dry_run"):
        click.echo(render("plan.txt", plan=plan))
        show_push(plan, recipe.push)
        return
    if not recipe.out:
        raise DeltaflError("no output; name a folder with --out")
    check_output(recipe.out, overwrite=recipe.overwrite)
    with reading_ahead(plan.files):
        if isinstance(plan.rule.core, ExampleRule):
            from deltafl.merge.examples import merge_by_examples as run_merge
        else:
            from deltafl.merge.run import run_merge  # torch, while the files are read

        with drawn_progress() as show:
            record = run_merge(plan, recipe.out, overwrite=recipe.overwrite, on_progress=show)
    for warning in record["warnings"]:
        click.echo(f"warning: {warning}", err=True)
    click.echo(render("merge.txt", plan=plan, record=record))
    push_merged(Path(recipe.out), recipe.push)
