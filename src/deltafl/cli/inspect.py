"""`deltafl inspect`."""

from collections.abc import Mapping
from math import nan
from typing import Any

import click

from deltafl.checkpoints.readahead import reading_ahead
from deltafl.cli.command import quiet, recipe_command
from deltafl.cli.merge import outside, read_merge
from deltafl.cli.progress import drawn_progress
from deltafl.files import check_output
from deltafl.merge.plan import plan_merge
from deltafl.merge.recipe import DeltaRecipe, MergeRecipe


@recipe_command(DeltaRecipe, argument="config", read=read_merge)
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
        from deltafl.report import Column, Table, inspect_page
        from deltafl.report.inspection import training_table

    def pairs(title: str, matrix: Mapping[str, Any]) -> str:
        columns = {name: Column(name, ".3f") for name in result["models"]}
        rows = [
            {
                name: nan if value is None else value
                for name, value in zip(columns, row, strict=True)
            }
            for row in matrix["matrix"]
        ]
        named = [{"": name, **row} for name, row in zip(columns, rows, strict=True)]
        return as_text(Table(named, {"": Column(title), **columns}))

    notes = [f"note: {note}" for note in result["notes"]] + [f"- {a}" for a in result["advice"]]
    parts = [as_text(training_table(result["training"])), pairs("cosine", result["cosine"])]
    parts += [pairs("same sign", result["sign_agreement"]), "\n".join([*notes, *outside(plan)])]
    click.echo("\n\n".join(parts))
    write_result(recipe.out, recipe.overwrite, inspect_page(result), "inspect.json", result)
