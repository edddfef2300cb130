"""`deltafl suite`."""

from pathlib import Path

import click

from deltafl.cli.command import flag, recipe_command
from deltafl.cli.progress import drawn_progress
from deltafl.cli.results import table_text
from deltafl.cli.run import show_settings
from deltafl.errors import DeltaflError
from deltafl.experiments import (
    STUDIES,
    SUITES,
    SuiteRecipe,
    read_suite,
    run_suites,
    suite_names,
)
from deltafl.report import comparison_page
from deltafl.training import TrainingRecipe


@recipe_command(SuiteRecipe, "resume", "dry_run", "quiet", read=read_suite)
@click.argument("names", nargs=-1)
def suite_command(recipes: tuple[SuiteRecipe, TrainingRecipe], names: tuple[str, ...]) -> None:
    """Compare federated runs: heterogeneity, local-steps, sparsity, calibration-rounds,
    mask-strategies, aggregators; and merges of fine-tunes: training-heterogeneity,
    data-heterogeneity, scaling-coef, examples, language, negation, analogy.

    Without --model, --data and --tasks a small ViT is pre-trained on scikit-learn's digits,
    offline.

    \b
    deltafl suite all --quick
    deltafl suite heterogeneity --nc-values 1 5 10 50 --full --num-runs 3 --model M --data DATA
    deltafl suite training-heterogeneity --num-runs 3 --model CLIP --head zero-shot --tasks ...
    """
    study = recipes[0].study
    chosen = suite_names(names, (*SUITES, *STUDIES))
    lacking = {n: why for n in chosen if n in STUDIES and (why := study.lacking(n))}
    if "all" not in names and lacking:
        raise DeltaflError(*(f"{name} needs {why}" for name, why in lacking.items()))
    for name, why in lacking.items():
        click.echo(f"left out: {name}, which needs {why}", err=True)
    if flag("dry_run"):
        show_settings(recipes[0])
    with drawn_progress() as show:
        wanted = [name for name in chosen if name not in lacking]
        result = run_suites(wanted, *recipes, resume=flag("resume"), on_progress=show)
    for table in comparison_page(result).tables:
        click.echo(f"{table_text(table)}\n")
    click.echo(f"report: {Path(recipes[0].out or '') / 'report.html'}")
