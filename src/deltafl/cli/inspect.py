"""`deltafl inspect`."""

from pathlib import Path
from typing import Any

import click

from deltafl.checkpoints.readahead import reading_ahead
from deltafl.cli.command import quiet, recipe_command
from deltafl.cli.merge import load_recipe, outside
from deltafl.cli.progress import drawn_progress
from deltafl.cli.text import table
from deltafl.files import atomic_folder, check_output
from deltafl.merge.plan import plan_merge
from deltafl.merge.recipe import DeltaRecipe, MergeRecipe


@recipe_command(MergeRecipe, argument="config", load=load_recipe, only=DeltaRecipe)
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
    click.echo(text(result))
    click.echo("\n".join(outside(plan)))
    if recipe.out is not None:
        write(result, recipe.out, recipe.overwrite)
        click.echo(f"report: {Path(recipe.out) / 'report.html'}")


def text(result: dict[str, Any]) -> str:
    """Norms, training and cosines as plain tables, then notes and advice."""
    names = result["models"]

    def known(value: Any) -> str:
        return "?" if value is None else f"{value:g}" if isinstance(value, float) else str(value)

    facts = [
        (
            t["model"],
            f"{t['norm']:.4g}",
            *(known(t[k]) for k in ("num_steps", "num_examples", "lr", "task")),
        )
        for t in result["training"]
    ]
    parts = [table(("model", "norm", "steps", "examples", "lr", "task"), facts)]
    for key, title in (("cosine", "cosine"), ("sign_agreement", "same sign")):
        rows = [
            (name, *("-" if v is None else f"{v:.3f}" for v in row))
            for name, row in zip(names, result[key]["matrix"], strict=True)
        ]
        parts.append(table((title, *names), rows))
    said = [f"note: {note}" for note in result["notes"]] + [
        f"- {line}" for line in result["advice"]
    ]
    return "\n\n".join([*parts, "\n".join(said)])


def write(result: dict[str, Any], out: str, overwrite: bool) -> None:
    """report.html, figure.png, inspect.json, whole or not at all."""
    from deltafl.report import inspect_figure, inspect_page, render
    from deltafl.training.record import write_json

    with atomic_folder(out, overwrite=overwrite) as folder:
        (folder / "report.html").write_text(render(inspect_page(result)))
        (folder / "figure.png").write_bytes(inspect_figure(result, "png"))
        write_json(folder / "inspect.json", result)
