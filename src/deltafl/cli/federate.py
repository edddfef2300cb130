"""`deltafl federate`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from deltafl.cli.command import quiet, recipe_command, resume
from deltafl.cli.progress import drawn_progress
from deltafl.cli.text import as_bytes, as_score, table
from deltafl.errors import DeltaflError
from deltafl.federated import FederatedRecipe
from deltafl.federated import federate as run
from deltafl.files import check_output, write_files
from deltafl.models import load_net
from deltafl.report import page_files, run_page
from deltafl.tasks import load_task
from deltafl.training.tensorboard import check_installed, write_scalars


@recipe_command(FederatedRecipe)
@click.option("--tensorboard", is_flag=True, help="Write OUT/metrics for TensorBoard too.")
@resume
@quiet
def federate(recipe: FederatedRecipe, tensorboard: bool, resume: bool, quiet: bool) -> None:
    """Federated training of a pre-trained model, test once, write the best model and report.html.

    With --heterogeneity-experiment, --local-steps-experiment or --compare-strategies it is `deltafl suite`
    with heterogeneity, local-steps or mask-strategies.

    \b
    deltafl federate --model facebook/dino-vits16 --data cifar100 --sharding non_iid --nc 5 --out DIR
    """
    if tensorboard:
        check_installed()
    if recipe.out is None:
        raise DeltaflError("no output; name a folder with --out")
    if not resume:
        check_output(recipe.out, overwrite=recipe.overwrite)
    net = load_net(recipe.model)
    task = load_task(recipe.data, net.inputs, recipe.seed)
    with drawn_progress(quiet=quiet) as show:
        done = run(net, task, recipe, resume=resume, on_progress=show)
    write_report(done.out, done.result, done.rows)
    if tensorboard:
        write_scalars(done.out)
    if not quiet:
        click.echo(summary(done.result, done.out))


def write_report(out: Path, result: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> None:
    """OUT/report.html and OUT/figure.png."""
    write_files(out, page_files(run_page(result, rows)))


def summary(result: Mapping[str, Any], out: Path) -> str:
    """What came out, in a small table."""
    metric = result["metric"]
    test, val = (as_score(result[f"{s}_score"], result["ratio_scaled"]) for s in ("test", "val"))
    facts = [
        (f"test {metric}", f"{test} of {result['test_examples']}"),
        (f"validation {metric}", f"{val} after round {result['best_round']}"),
        ("rounds", str(result["rounds"])),
        ("sent by clients", as_bytes(result["bytes_up_total"])),
        ("sent by the server", as_bytes(result["bytes_down_total"])),
        (
            "in step 0",
            f"{as_bytes(result['setup_bytes_up'])} up, {as_bytes(result['setup_bytes_down'])} down",
        ),
        ("updates left out", str(result["failed_updates"])),
    ]
    return f"{table(('federated run', ''), facts)}\nmodel: {out / 'model'}\nreport: {out / 'report.html'}"
