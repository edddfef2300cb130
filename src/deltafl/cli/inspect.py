"""`deltafl inspect`."""

from collections.abc import Mapping
from typing import Any

import click

from deltafl.checkpoints.readahead import reading_ahead
from deltafl.cli.command import quiet, recipe_command
from deltafl.cli.merge import outside, read_merge
from deltafl.cli.progress import drawn_progress
from deltafl.cli.text import table
from deltafl.files import check_output
from deltafl.merge.plan import plan_merge
from deltafl.merge.recipe import DeltaRecipe, MergeRecipe


@recipe_command(MergeRecipe, argument="config", only=DeltaRecipe, read=read_merge)
@quiet
def inspect(recipe: MergeRecipe, quiet: bool) -> None:
    """How much fine-tunes of one base differ, and which rule that suggests.

    \b
    deltafl inspect --base B --models M1 M2 ... --out DIR
    """
    plan = plan_merge(recipe)
    if recipe.out is not None:
        plan.refuse_as_output(recipe.out)
        check_output(recipe.out, overwrite=recipe.overwrite)
    with reading_ahead(plan.files):
        from deltafl.merge.inputs import open_updates  # torch, while the files are read
        from deltafl.merge.inspect import inspect_models

        with drawn_progress(quiet=quiet) as show, open_updates(plan) as opened:
            result = inspect_models(plan, opened, show)
        from deltafl.cli.results import as_text, write_result
        from deltafl.report import inspect_page
        from deltafl.report.inspection import training_table
    click.echo(as_text(training_table(result["training"])))
    click.echo(_text(result))
    click.echo("\n".join(outside(plan)))
    if recipe.out is not None:
        page = inspect_page(result)
        write_result(recipe.out, recipe.overwrite, page, "inspect.json", result)


def _text(result: Mapping[str, Any]) -> str:
    """Cosines and signs as plain tables, then notes and advice."""
    parts, names = [], result["models"]
    for key, title in (("cosine", "cosine"), ("sign_agreement", "same sign")):
        rows = [
            (name, *("-" if v is None else f"{v:.3f}" for v in row))
            for name, row in zip(names, result[key]["matrix"], strict=True)
        ]
        parts.append(table((title, *names), rows))
    lines = [f"note: {note}" for note in result["notes"]] + [f"- {a}" for a in result["advice"]]
    return "\n\n".join(["", *parts, "\n".join(lines)])
