"""`deltafl search`."""

from pathlib import Path
from typing import Any

import click

from deltafl.cli.command import command_line, dry_run, quiet, recipe_command
from deltafl.cli.merge import describe_plan
from deltafl.cli.progress import drawn_progress
from deltafl.files import atomic_folder, check_output
from deltafl.merge.plan import plan_merge
from deltafl.merge.search_recipe import SearchRecipe


@recipe_command(SearchRecipe, argument="config")
@dry_run
@quiet
def search(recipe: SearchRecipe, dry_run: bool, quiet: bool) -> None:
    """Choose method and coefficients on validation data, test once, write the merged model.

    \b
    deltafl search RECIPE.yaml --out DIR
    """
    plan = plan_merge(recipe.merge())
    if recipe.out is not None:
        plan.refuse_as_output(recipe.out)
        check_output(recipe.out, overwrite=recipe.overwrite)
    if dry_run:
        click.echo(describe_plan(plan))
        return
    from deltafl.cli.results import as_text, write_search
    from deltafl.merge.search_run import run_search  # torch
    from deltafl.report import results_table

    with drawn_progress(quiet=quiet) as show:
        if recipe.out is None:
            result = run_search(recipe, None, on_progress=show)
        else:
            with atomic_folder(recipe.out, overwrite=recipe.overwrite) as folder:
                scores = folder / "scores.safetensors"
                result = run_search(recipe, folder / "merged", scores=scores, on_progress=show)
                write_search(published(result, recipe), folder, recipe.resolved())
    if not quiet:
        click.echo(as_text(results_table(published(result, recipe))))
        if result["strategy"] == "racing":
            click.echo(race_line(result["examples"]))
        if recipe.out is not None:
            merged = f"merged model: {Path(recipe.out) / 'merged'}"
            kept = "no merged model: on validation data no candidate is better than the base"
            click.echo(kept if result["best"]["method"] == "base" else merged)
            click.echo(f"report: {Path(recipe.out) / 'report.html'}")


def published(result: dict[str, Any], recipe: SearchRecipe) -> dict[str, Any]:
    """The result with the scores that were published, as shares."""
    reference = {name: round(value / 100, 6) for name, value in recipe.reference.items()}
    return result | {"reference": reference, "command": command_line()}


def race_line(examples: dict[str, int]) -> str:
    """How much a race evaluated, against an exhaustive search."""
    evaluated, whole = examples["evaluated"], examples["exhaustive"]
    return f"racing: {evaluated:,} examples evaluated, {whole / evaluated:.1f} times fewer than all {whole:,}"
