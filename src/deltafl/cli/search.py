"""`deltafl search`."""

import shlex
import sys
from contextlib import nullcontext
from pathlib import Path

import click

from deltafl.cli.command import flag, recipe_command
from deltafl.cli.progress import drawn_progress
from deltafl.cli.push import push_merged, show_push
from deltafl.cli.results import page_text, write_search
from deltafl.files import atomic_folder, check_output
from deltafl.merge.plan import plan_merge
from deltafl.merge.search_recipe import SearchRecipe
from deltafl.merge.search_run import run_search
from deltafl.rendering import render
from deltafl.report import search_page


@recipe_command(SearchRecipe, "dry_run", "quiet", argument="config")
def search_command(recipe: SearchRecipe) -> None:
    """Choose method and coefficients on validation data, test once, write the merged model.

    \b
    deltafl search RECIPE.yaml --out DIR
    """
    plan, out = plan_merge(recipe.merge()), recipe.out
    if out is not None:
        plan.refuse_as_output(out)
        check_output(out, overwrite=recipe.overwrite)
    if flag("dry_run"):
        click.echo(render("plan.txt", plan=plan))
        show_push(plan, recipe.push)
        return
    whole = nullcontext() if out is None else atomic_folder(out, overwrite=recipe.overwrite)
    with drawn_progress() as show, whole as folder:
        merged, scores = (folder and folder / name for name in ("merged", "scores.safetensors"))
        result = run_search(recipe, merged, scores=scores, on_progress=show)
        result["reference"] = {row: round(v / 100, 6) for row, v in recipe.reference.items()}
        result["command"] = shlex.join(["deltafl", *sys.argv[1:]])
        if folder:
            write_search(result, folder, recipe.resolved())
    click.echo(page_text(search_page(result), out=out))
    push_merged(Path(out or "") / "merged", out and recipe.push)
