"""`deltafl search`."""

import shlex
import sys
from contextlib import nullcontext
from pathlib import Path

import click

from deltafl.cli.command import dry_run, quiet, recipe_command
from deltafl.cli.progress import drawn_progress
from deltafl.cli.results import table_text, write_search
from deltafl.cli.text import render
from deltafl.files import atomic_folder, check_output
from deltafl.merge.plan import plan_merge
from deltafl.merge.search_recipe import SearchRecipe
from deltafl.merge.search_run import run_search
from deltafl.report import results_table


@recipe_command(SearchRecipe, argument="config")
@dry_run
@quiet
def search_command(recipe: SearchRecipe, dry_run: bool, quiet: bool) -> None:
    """Choose method and coefficients on validation data, test once, write the merged model.

    \b
    deltafl search RECIPE.yaml --out DIR
    """
    plan, out = plan_merge(recipe.merge()), recipe.out
    if out is not None:
        plan.refuse_as_output(out)
        check_output(out, overwrite=recipe.overwrite)
    if dry_run:
        click.echo(render("plan", plan=plan))
        return
    whole = nullcontext() if out is None else atomic_folder(out, overwrite=recipe.overwrite)
    with drawn_progress(quiet=quiet) as show, whole as folder:
        merged, scores = (folder and folder / name for name in ("merged", "scores.safetensors"))
        result = run_search(recipe, merged, scores=scores, on_progress=show)
        result["reference"] = {row: round(v / 100, 6) for row, v in recipe.reference.items()}
        result["command"] = shlex.join(["deltafl", *sys.argv[1:]])
        if folder:
            write_search(result, folder, recipe.resolved())
    if quiet:
        return
    click.echo(table_text(results_table(result)))
    if result["strategy"] == "racing":
        evaluated, every = result["examples"]["evaluated"], result["examples"]["exhaustive"]
        fewer = f"{every / evaluated:.1f} times fewer than all {every:,}"
        click.echo(f"racing: {evaluated:,} examples evaluated, {fewer}")
    if out is not None:
        kept = "no merged model: on validation data no candidate is better than the base"
        click.echo(
            kept if result["best"]["method"] == "base" else f"merged model: {Path(out) / 'merged'}"
        )
        click.echo(f"report: {Path(out) / 'report.html'}")
