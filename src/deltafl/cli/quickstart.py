"""`deltafl quickstart`."""

from pathlib import Path

import click

from deltafl.cli.command import flag, recipe_command
from deltafl.cli.progress import drawn_progress
from deltafl.cli.results import page_text, write_search
from deltafl.cli.run import show_settings
from deltafl.experiments import run_quickstart
from deltafl.experiments.recipe import QuickstartRecipe
from deltafl.files import atomic_folder, check_output
from deltafl.report import search_page


@recipe_command(QuickstartRecipe, "dry_run", "quiet")
def quickstart_command(recipe: QuickstartRecipe) -> None:
    """Pre-train, fine-tune, merge, search and test on real digits, offline, in about a minute."""
    out = Path(recipe.out)
    check_output(out, overwrite=recipe.overwrite)
    if flag("dry_run"):
        show_settings(recipe)
    with drawn_progress() as show, atomic_folder(out, overwrite=recipe.overwrite) as folder:
        result = run_quickstart(folder, seed=recipe.seed, on_progress=show)
        command = f"deltafl quickstart --seed {recipe.seed}"
        told = {"command": command, "seed": recipe.seed}
        write_search(result | {"command": command}, folder, told, story=True)
        for file in folder.rglob("*.json"):  # the records name the folder as it will be called
            file.write_text(file.read_text().replace(str(folder), str(out.absolute())))
    click.echo(page_text(search_page(result), out=out))
