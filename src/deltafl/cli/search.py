"""`deltafl search`."""

from pathlib import Path
from typing import Any

import click

from deltafl.cli.options import progress_by_count
from deltafl.cli.text import as_text


@click.command()
@click.argument("recipe")
@click.option("--out", help="The folder for the merged model, every row, tables and report.html.")
@click.option("--overwrite", is_flag=True, default=None, help="Replace an existing output.")
@click.option(
    "--data-dir", help="The folder that holds tasks by name; without it they come from the hub."
)
@click.option(
    "--templates",
    help="Prompts for the zero-shot heads: a file, one on each line, {} for the class.",
)
@click.option(
    "--grid",
    type=click.Choice(["default", "paper"]),
    help="Convention of the coefficients (see docs).",
)
@click.option(
    "--metric", type=click.Choice(["normalized", "absolute"]), help="Default: normalized."
)
@click.option("--strategy", help="exhaustive (default) or racing: drop early what cannot win.")
@click.option(
    "--confidence", type=float, help="With which racing keeps the best candidate. Default: 0.95."
)
@click.option(
    "--each-method",
    is_flag=True,
    default=None,
    help="Race within each method: the best of each is exact.",
)
@click.option("--device", help="cpu (default) or cuda.")
@click.option("--threads", type=int, help="Default: one for each core.")
@click.option(
    "--memory", help="Hold checkpoints up to this size rather than read them again. Default: 8GB."
)
@click.option("--batch-size", type=int, help="Images in one evaluation step. Default: 256.")
@click.option("--scope", help="Merge only tensors below this name.")
@click.option(
    "--seed",
    type=int,
    help="Of the validation splits. Default: the one that each model was trained with.",
)
@click.option("--quiet", is_flag=True, help="No progress, no table.")
def search(recipe: str, quiet: bool, **options: Any) -> None:
    """Choose method and coefficients on validation data, test once, write the merged model.

    \b
    deltafl search RECIPE.yaml --out DIR
    """
    from deltafl.experiments.one_shot import run_search
    from deltafl.files import atomic_folder, check_output
    from deltafl.merge.plan import plan_merge
    from deltafl.merge.recipe import load_yaml, parse
    from deltafl.merge.run import refuse_inputs_as_output
    from deltafl.merge.search_recipe import SearchRecipe
    from deltafl.report import results_table

    held = parse(
        SearchRecipe, load_yaml(recipe) | {k: v for k, v in options.items() if v is not None}
    )
    spec = held.spec()
    published = {
        "reference": {name: round(value / 100, 6) for name, value in held.reference.items()}
    }
    if held.out is not None:
        refuse_inputs_as_output(plan_merge(spec.merge), Path(held.out))
        check_output(held.out, overwrite=held.overwrite)
    with progress_by_count("searching", quiet=quiet) as advance:
        if held.out is None:
            result = run_search(spec, None, on_row=lambda row, total: advance(total))
        else:
            with atomic_folder(held.out, overwrite=held.overwrite) as folder:
                scores = folder / "scores.safetensors"
                result = run_search(
                    spec, folder / "merged", scores=scores, on_row=lambda row, total: advance(total)
                )
                result |= published | {"command": f"deltafl search {recipe}"}
                write_result(result, folder, held.model_dump())
    if not quiet:
        click.echo(as_text(results_table(result | published)))
        if result["strategy"] == "racing":
            click.echo(race_line(result["examples"]))
        if held.out is not None:
            merged = f"merged model: {Path(held.out) / 'merged'}"
            kept = "no merged model: on validation data no candidate is better than the base"
            click.echo(kept if result["best"]["method"] == "base" else merged)
            click.echo(f"report: {Path(held.out) / 'report.html'}")


def write_result(
    result: dict[str, Any], folder: Path, config: dict[str, Any], *, story: bool = False
) -> None:
    """config.yaml, record.jsonl (one row for each candidate), result.json, table.md/.csv/.tex and report.html."""
    from deltafl.files import write_files
    from deltafl.report import page_files, search_page
    from deltafl.training.record import RunRecord, write_json

    record = RunRecord.create(folder, config)
    for row in result["candidates"]:
        record.append({"event": "candidate", **row})
    for row in result["rows"]:
        record.append({"event": "test", **row})
    write_json(folder / "result.json", result)
    write_files(folder, page_files(search_page(result, story=story)))


def race_line(examples: dict[str, int]) -> str:
    """How much a race evaluated, against an exhaustive search."""
    evaluated, whole = examples["evaluated"], examples["exhaustive"]
    return f"racing: {evaluated:,} examples evaluated, {whole / evaluated:.1f} times fewer than all {whole:,}"
