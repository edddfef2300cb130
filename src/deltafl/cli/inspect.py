"""`deltafl inspect`."""

from pathlib import Path
from typing import Any

import click

from deltafl.checkpoints.readahead import reading_ahead
from deltafl.cli.merge import merge_options, outside, read_recipe
from deltafl.cli.options import ManyValues, progress_by_bytes, table
from deltafl.merge.plan import plan_merge


@click.command(cls=ManyValues)
@click.argument("recipe", required=False)
@merge_options
@click.option("--out", default=None, help="A folder for report.html, figure.png and inspect.json.")
@click.option("--overwrite", is_flag=True, help="Replace an existing output.")
@click.option("--quiet", is_flag=True, help="No progress.")
def inspect(
    recipe: str | None, out: str | None, overwrite: bool, quiet: bool, **options: Any
) -> None:
    """How much fine-tunes of one base differ, and which rule that suggests.

    \b
    deltafl inspect --base B --models M1 M2 ... --out DIR
    """
    from deltafl.files import check_output

    plan = plan_merge(read_recipe(recipe, options).spec())
    if out is not None:
        from deltafl.merge.run import refuse_inputs_as_output

        refuse_inputs_as_output(plan, Path(out))
        check_output(out, overwrite=overwrite)
    total, size = plan.num_elements * len(plan.sources), plan.bytes_read / plan.passes
    with reading_ahead([f for layout in (plan.base, *plan.layouts.values()) for f in layout.files]):
        from deltafl.merge.inputs import open_updates
        from deltafl.merge.inspect import inspect_models

        with (
            progress_by_bytes("reading", size, quiet=quiet) as advance,
            open_updates(plan) as opened,
        ):
            result = inspect_models(
                plan, opened, lambda count: advance(count * size / max(total, 1))
            )
    click.echo(text(result))
    click.echo("\n".join(outside(plan)))
    if out is not None:
        write(result, out, overwrite)
        click.echo(f"report: {Path(out) / 'report.html'}")


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
    from deltafl.files import atomic_folder, write_files
    from deltafl.report import inspect_page, page_files
    from deltafl.training.record import write_json

    with atomic_folder(out, overwrite=overwrite) as folder:
        write_files(folder, page_files(inspect_page(result)))
        write_json(folder / "inspect.json", result)
