"""`deltafl search`."""

from pathlib import Path
from typing import Any

import click

from deltafl.cli.command import command_line, dry_run, quiet, recipe_command
from deltafl.cli.merge import describe_plan
from deltafl.cli.progress import drawn_progress
from deltafl.cli.text import table
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
    from deltafl.experiments.one_shot import run_search  # torch

    with drawn_progress(quiet=quiet) as show:
        if recipe.out is None:
            result = run_search(recipe, None, on_progress=show)
        else:
            with atomic_folder(recipe.out, overwrite=recipe.overwrite) as folder:
                scores = folder / "scores.safetensors"
                result = run_search(recipe, folder / "merged", scores=scores, on_progress=show)
                write_result(published(result, recipe), folder, recipe.resolved())
    if not quiet:
        click.echo(results(published(result, recipe)))
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


def write_result(
    result: dict[str, Any], folder: Path, config: dict[str, Any], *, story: bool = False
) -> None:
    """config.yaml, record.jsonl (one row for each candidate), result.json, table.md/.csv/.tex and report.html."""
    from deltafl.report import quickstart_page, render, search_page, to_csv, to_latex, to_markdown
    from deltafl.report.parts import results_table
    from deltafl.training.record import RunRecord, write_json

    record = RunRecord.create(folder, config)
    for row in result["candidates"]:
        record.append({"event": "candidate", **row})
    for row in result["rows"]:
        record.append({"event": "test", **row})
    write_json(folder / "result.json", result)
    numbers = results_table(result)
    for suffix, write in (("md", to_markdown), ("csv", to_csv), ("tex", to_latex)):
        (folder / f"table.{suffix}").write_text(write(numbers))
    page = quickstart_page(result) if story else search_page(result)
    (folder / "report.html").write_text(render(page))


def race_line(examples: dict[str, int]) -> str:
    """How much a race evaluated, against an exhaustive search."""
    evaluated, whole = examples["evaluated"], examples["exhaustive"]
    return f"racing: {evaluated:,} examples evaluated, {whole / evaluated:.1f} times fewer than all {whole:,}"


def results(result: dict[str, Any]) -> str:
    """The table of test accuracies, in percent, as plain text, with what is published beside it."""
    from deltafl.report.parts import only_published

    reference = result.get("reference") or {}

    def cell(value: float | None) -> str:
        return "-" if value is None else f"{100 * value:.1f}"

    rows = []
    for row in result["rows"]:
        rho = row["params"].get("rho")
        scale = "" if row["scaling_coef"] is None else f"{row['scaling_coef']:g}"
        known = ("" if rho is None else f"{rho:.3g}", scale, cell(row["val"]))
        rows.append(
            (
                row["rule"],
                *known,
                *(cell(row["test"][t]) for t in result["tasks"]),
                cell(row["mean"]),
                cell(row["normalized"]),
                *([cell(reference.get(row["rule"]))] if reference else []),
            )
        )
    empty = [""] * (len(result["tasks"]) + 5)
    rows += [(name, *empty, cell(value)) for name, value in only_published(result).items()]
    short = [t.removeprefix("digits_") for t in result["tasks"]]
    published = ["published"] if reference else []
    return table(("model", "rho", "lambda", "val", *short, "mean", "normalized", *published), rows)
