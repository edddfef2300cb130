"""`deltafl quickstart`."""

from pathlib import Path

import click

from deltafl.cli.progress import drawn_progress
from deltafl.cli.results import as_text, write_search


@click.command()
@click.option("--out", default="quickstart", show_default=True, help="The folder to write.")
@click.option("--seed", default=0, show_default=True, help="Same seed, same numbers.")
@click.option("--overwrite", is_flag=True, help="Replace an existing output.")
@click.option("--quiet", is_flag=True, help="No progress, no table.")
def quickstart(out: str, seed: int, overwrite: bool, quiet: bool) -> None:
    """Pre-train, fine-tune, merge, search and test on real digits, offline, in about a minute."""
    from deltafl.experiments.quickstart import run_quickstart
    from deltafl.files import atomic_folder, check_output
    from deltafl.report import results_table

    check_output(out, overwrite=overwrite)
    with (
        drawn_progress(quiet=quiet) as show,
        atomic_folder(out, overwrite=overwrite) as folder,
    ):
        result = run_quickstart(folder, seed=seed, on_progress=show)
        command = f"deltafl quickstart --seed {seed}"
        write_search(
            result | {"command": command}, folder, {"command": command, "seed": seed}, story=True
        )
        for file in folder.rglob("*.json"):  # the records name the folder as it will be called
            file.write_text(file.read_text().replace(str(folder), str(Path(out).absolute())))
    if not quiet:
        click.echo(as_text(results_table(result)))
        merged = Path(out) / "merged"
        made = (
            f"one model for all tasks: {merged}"
            if merged.exists()
            else "no merge beats the base on validation data"
        )
        click.echo(f"{result['seconds']:.0f} s; {made}")
        click.echo(f"the story with figures: {Path(out) / 'report.html'}")
