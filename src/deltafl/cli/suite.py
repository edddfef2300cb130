"""`deltafl suite`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from deltafl.cli.federate import (
    EXTRA,
    HELP,
    federate_settings,
    recipe_of,
    task_options,
    workers_option,
)
from deltafl.cli.options import ManyValues, progress_by_stage, rule_options, write_table
from deltafl.cli.settings import recipe_options
from deltafl.cli.studies import (
    check_data,
    make_study,
    run_studies,
    study_defaults,
    study_keys,
    study_of,
    study_options,
)
from deltafl.errors import DeltaflError
from deltafl.experiments.federated_suites import SUITES, SuiteOptions, check_suites
from deltafl.experiments.studies.options import STUDY_NAMES, names_of
from deltafl.federated.recipe import FederatedRecipe
from deltafl.models.heads import HEAD_FILE

QUICK: dict[str, Any] = {
    "num_clients": 20,
    "participation_rate": 0.25,
    "num_rounds": 6,
    "batch_size": 32,
    "lr": 0.002,
    "eval_every": 2,
}
"""Of `--quick`, under what is given."""

BUNDLED = "digits:mirrored"
"""The task without --data: images on which the bundled base model, with its own head, is poor at first."""

FULL: dict[str, Any] = {
    "num_clients": 100,
    "participation_rate": 0.1,
    "num_rounds": 500,
    "eval_every": 10,
}
"""Of `--full`, under what is given."""

VALUES = {
    "nc_values": (
        "--nc-values",
        int,
        "Classes per client: heterogeneity; the second value is used by the others.",
    ),
    "j_values": ("--j-values", int, "Local steps: local-steps."),
    "sparsity_ratios": (
        "--sparsity-ratio",
        float,
        "Shares of frozen coordinates; the middle one is used by others.",
    ),
    "calibration_values": ("--calibration-values", int, "Rounds of scoring: calibration-rounds."),
}


def value_options(command: Any) -> Any:
    """Decorator: the lists of values that suites go through."""
    for name, (flag, kind, text) in reversed(VALUES.items()):
        default = " ".join(str(v) for v in getattr(SuiteOptions, name))
        command = click.option(
            flag, name, type=kind, multiple=True, help=f"{text} Default: {default}."
        )(command)
    return command


@click.command(cls=ManyValues)
@click.argument("names", nargs=-1)
@task_options
@click.option("--out", help="The folder to write. Default: deltafl-suite.")
@value_options
@study_options
@recipe_options(FederatedRecipe, HELP, skip=("aggregator_params", "sparsity_ratio"))
@rule_options("seed")
@workers_option
@click.option("--quick", is_flag=True, help="Small settings: minutes on 2 cores.")
@click.option("--full", is_flag=True, help="The settings of the assignment: hours on a GPU.")
@click.option(
    "--num-runs",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Seeds of every row.",
)
@click.option(
    "--tensorboard",
    is_flag=True,
    help="Write OUT/metrics for TensorBoard too, a folder for each run.",
)
@click.option("--resume", is_flag=True, help="Continue a suite: finished runs are kept.")
@click.option("--overwrite", is_flag=True, help="Replace an existing output.")
@click.option("--quiet", is_flag=True, help="No progress, no tables.")
def suite(
    names: tuple[str, ...],
    config: str | None,
    quick: bool,
    full: bool,
    num_runs: int,
    tensorboard: bool,
    resume: bool,
    overwrite: bool,
    quiet: bool,
    nc_values: tuple[int, ...],
    j_values: tuple[int, ...],
    sparsity_ratios: tuple[float, ...],
    calibration_values: tuple[int, ...],
    **options: Any,
) -> None:
    """Compare federated runs: heterogeneity, local-steps, sparsity, calibration-rounds, mask-strategies, aggregators;
    and merges of fine-tunes: training-heterogeneity, data-heterogeneity, scaling-coef, negation, analogy.

    Without --model, --data and --tasks a small ViT is pre-trained on scikit-learn's digits, offline.

    \b
    deltafl suite all --quick
    deltafl suite heterogeneity --nc-values 1 5 10 50 --full --num-runs 3 --model facebook/dino-vits16 --data DATA
    deltafl suite training-heterogeneity --num-runs 3 --model openai/clip-vit-base-patch32 --head zero-shot --tasks ...
    """
    if quick and full:
        raise DeltaflError("--quick and --full are two sizes; give one of them")
    chosen = names_of(names, (*SUITES, *STUDY_NAMES))
    from deltafl.recipes import load_yaml

    options = {k: v for k, v in options.items() if v not in (None, ())}
    explicit = (load_yaml(config) if config else {}) | options
    bundled = not {"model", "data", "tasks"} & explicit.keys()
    sizes = QUICK if quick else FULL if full else {}
    defaults = {"out": "deltafl-suite", **sizes, **study_defaults(quick=quick, bundled=bundled)}
    extra = EXTRA | study_keys()
    if not set(chosen) & set(SUITES):
        extra |= {"data": (str | None, None)}
    if bundled:
        defaults |= {"model": "", "data": BUNDLED, "head": ""}
    lists = {k: list(v) if isinstance(v, tuple) else v for k, v in options.items()}
    held = federate_settings(config, lists, defaults, extra)
    given = {"nc_values": nc_values, "j_values": j_values, "sparsity_ratios": sparsity_ratios}
    given |= {"calibration_values": calibration_values}
    small: dict[str, Any] = (
        {"nc_values": (2, 5), "calibration_values": (1, 2, 4)} if bundled else {}
    )
    small |= {"j_values": (4, 8, 12)} if quick else {}
    values = SuiteOptions(**(small | {k: v for k, v in given.items() if v}))
    lacking = study_of(held).lacking() if "all" in names else {}
    for name, need in lacking.items():
        click.echo(f"left out: {name}, which needs {need}", err=True)
    studies = [name for name in chosen if name in STUDY_NAMES and name not in lacking]
    run_suites(
        [name for name in chosen if name in SUITES],
        held,
        values,
        make_study(studies, held, explicit, num_runs, bundled=bundled) if studies else None,
        studies,
        num_runs=num_runs,
        tensorboard=tensorboard,
        resume=resume,
        overwrite=overwrite,
        quiet=quiet,
    )


def run_suites(
    names: list[str],
    held: dict[str, Any],
    values: SuiteOptions | None = None,
    study: Any = None,
    studies: Sequence[str] = (),
    *,
    num_runs: int = 1,
    tensorboard: bool = False,
    resume: bool,
    overwrite: bool,
    quiet: bool,
) -> None:
    """Run the suites `names` with the settings `held`, and the `studies`; write tables, figures and the report.

    Raises:
        DeltaflError: what can be told before anything runs, and then nothing has changed; or no run could be made.
    """
    out = Path(held["out"])
    bundled = not held["model"]
    if bundled:
        held = held | {
            "model": str(out / "base"),
            "head": held["head"] or str(out / "base" / HEAD_FILE),
        }
    cells = check_suites(names, recipe_of(held), values or SuiteOptions()) if names else {}
    from deltafl.cli.federate import load_encoder_of, load_task_of
    from deltafl.experiments.quickstart import IMAGE_SIZE
    from deltafl.experiments.studies.study import save_base
    from deltafl.experiments.suite_runs import Bench, preflight, run_suite
    from deltafl.files import check_output
    from deltafl.training.tensorboard import METRICS, check_installed

    if tensorboard:
        check_installed()
    if not resume:
        check_output(out, overwrite=overwrite)
    encoder = None if bundled else load_encoder_of(held)
    size, channels = (
        (IMAGE_SIZE, 1) if encoder is None else (encoder.input.image_size, encoder.input.channels)
    )
    if names:
        preflight(
            cells,
            _bundled_task(held) if encoder is None else load_task_of(held, encoder, held["seed"]),
            held["device"],
        )
    if study is not None:
        check_data(study, studies, size, channels)
    if not resume:
        _clear(out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "suite.json").touch()
    with progress_by_stage(quiet=quiet) as show:
        if encoder is None:
            _pretrain(out / "base", held["seed"], show)
            encoder = load_encoder_of(held)
        elif study is not None:
            save_base(encoder, out / "base")
        bench = Bench(
            encoder,
            lambda seed: load_task_of(held, encoder, seed),
            out / "runs",
            num_runs,
            held["device"],
            out / METRICS if tensorboard else None,
            held["workers"],
        )
        suites = {name: run_suite(name, cells[name], bench, show) for name in names}
        found = run_studies(studies, study, held["jobs"], out, show) if study is not None else {}
    if names and not any(s["runs"] for summaries in suites.values() for s in summaries):
        raise DeltaflError(
            *dict.fromkeys(s["failed"] for summaries in suites.values() for s in summaries)
        )
    model = "A small ViT, pre-trained on digits," if bundled else held["model"]
    data = ", ".join(
        dict.fromkeys([held["data"]] * bool(names) + list(study.tasks if study is not None else []))
    )
    write_suites(
        {"model": model, "task": data, "num_runs": num_runs, "suites": suites, "studies": found},
        out,
    )
    if not quiet:
        _show(suites, found)
        click.echo(f"report: {out / 'report.html'}")


def write_suites(result: dict[str, Any], out: Path) -> None:
    """suite.json, report.html, and SUITE/table.md, .csv, .tex and figures of the federated suites."""
    from deltafl.files import write_atomically
    from deltafl.report import render
    from deltafl.report.suites import best, suite_figure, suite_table, suites_page
    from deltafl.training.record import write_json

    for name, summaries in result["suites"].items():
        table = suite_table(name, summaries)
        write_table(table, out / name / "table")
        if best(summaries):
            for key in ("by_round", "by_bytes"):
                write_atomically(out / name / f"{key}.png", suite_figure(summaries, key))
    write_atomically(out / "report.html", render(suites_page(result)).encode())
    write_json(out / "suite.json", result)


def _show(suites: Mapping[str, Any], studies: Mapping[str, Any]) -> None:
    """All tables on the terminal."""
    from deltafl.report import to_markdown
    from deltafl.report.studies import study_tables
    from deltafl.report.suites import suite_table

    tables = [suite_table(name, summaries) for name, summaries in suites.items()]
    tables += [
        table for name, result in studies.items() for table in study_tables(name, result).values()
    ]
    for table in tables:
        click.echo(to_markdown(table))


def _bundled_task(held: dict[str, Any]) -> Any:
    """The task in the size of the base model that is not there yet."""
    from deltafl.experiments.quickstart import IMAGE_SIZE
    from deltafl.tasks.arrays import load_arrays

    return load_arrays(
        held["data"], image_size=IMAGE_SIZE, channels=1, seed=held["seed"], limit=held["limit"]
    )


def _pretrain(base: Path, seed: int, show: Any) -> None:
    """The quickstart's base, made once, on one core as there. Raises DeltaflError if it was made with another seed."""
    import json

    from deltafl.experiments.quickstart import pretrain
    from deltafl.pool import one_thread

    if not (base / "training.json").is_file():
        with one_thread():
            pretrain(base, seed, show)
    elif (made := json.loads((base / "training.json").read_text())["seed"]) != seed:
        raise DeltaflError(
            f'"{base}" was made with seed {made}, now it is {seed}; choose another --out, or --overwrite'
        )


def _clear(out: Path) -> None:
    import shutil

    if out.exists():
        shutil.rmtree(out)
