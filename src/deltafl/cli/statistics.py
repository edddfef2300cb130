"""`deltafl statistics`."""

import click

from deltafl.cli.command import recipe_command
from deltafl.cli.progress import drawn_progress
from deltafl.merge.examples import write_statistics
from deltafl.merge.recipe import StatisticsRecipe


@recipe_command(StatisticsRecipe, "quiet")
def statistics_command(recipe: StatisticsRecipe) -> None:
    """Write what a merge by regmean or fisher needs of a model's task, to share in place of data.

    \b
    deltafl statistics --model M --task T --kind gram
    deltafl merge --method regmean ...     without --tasks
    """
    with drawn_progress() as show:
        out = write_statistics(recipe, show)
    click.echo(f"statistics: {out}")
