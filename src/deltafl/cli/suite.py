"""`deltafl suite`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import click
from pydantic import create_model

from deltafl.cli.command import recipe_options
from deltafl.cli.options import ManyValues, progress_by_stage
from deltafl.cli.results import as_text
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
from deltafl.models.head import HEAD_FILE
from deltafl.recipes import leaves, load_yaml, read_recipe

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
@value_options
@study_options
@recipe_options(FederatedRecipe, skip=("sparsity_ratio",))
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
@click.option("--quiet", is_flag=True, help="No progress, no tables.")
def suite(
    names: tuple[str, ...],
    config: str | None,
    quick: bool,
    full: bool,
    num_runs: int,
    tensorboard: bool,
    resume: bool,
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
    options = {k: v for k, v in options.items() if v not in (None, ())}
    kind = suite_kind()
    explicit = leaves_of(kind, load_yaml(config) if config else {}) | options
    bundled = not {"model", "data", "tasks"} & explicit.keys()
    sizes = QUICK if quick else FULL if full else {}
    defaults = {"out": "deltafl-suite", **sizes, **study_defaults(quick=quick, bundled=bundled)}
    if not set(chosen) & set(SUITES):
        defaults |= {"data": ""}
    if bundled:
        defaults |= {"model": "", "data": BUNDLED, "head": ""}
    found = read_recipe(kind, config, options, defaults=defaults)
    held = leaves_of(kind, found.resolved())
    own = {name: getattr(found, name) for name in FederatedRecipe.model_fields}
    recipe = FederatedRecipe.model_validate(own)
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
        recipe,
        values,
        make_study(studies, held, explicit, num_runs, bundled=bundled) if studies else None,
        studies,
        jobs=held["jobs"],
        num_runs=num_runs,
        tensorboard=tensorboard,
        resume=resume,
        quiet=quiet,
    )


def suite_kind() -> type[FederatedRecipe]:
    """The recipe of a file for `deltafl suite`: of federated runs, with the settings of studies."""
    made = create_model("SuiteRecipe", __base__=FederatedRecipe, **study_keys())
    return cast(type[FederatedRecipe], made)


def leaves_of(kind: type[FederatedRecipe], data: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that a file gives, by their names."""
    found: dict[str, Any] = {}
    for leaf in leaves(kind).values():
        section: Any = data
        for key in leaf.path[:-1]:
            section = section.get(key, {}) if isinstance(section, Mapping) else {}
        if isinstance(section, Mapping) and leaf.path[-1] in section:
            found[leaf.name] = section[leaf.path[-1]]
    return found


def run_suites(
    names: list[str],
    recipe: FederatedRecipe,
    values: SuiteOptions | None = None,
    study: Any = None,
    studies: Sequence[str] = (),
    *,
    jobs: int | None = None,
    num_runs: int = 1,
    tensorboard: bool = False,
    resume: bool,
    quiet: bool,
) -> None:
    """Run the suites `names` around `recipe`, and the `studies`; write tables, figures and the report.

    Raises:
        DeltaflError: what can be told before anything runs, and then nothing has changed; or no run could be made.
    """
    out = Path(recipe.out or "")
    bundled = not recipe.model
    if bundled:
        head = recipe.head.head or str(out / "base" / HEAD_FILE)
        recipe = recipe.replace(model=str(out / "base"), head=head)
    cells = check_suites(names, recipe, values or SuiteOptions()) if names else {}
    from deltafl.experiments.quickstart import IMAGE_SIZE
    from deltafl.experiments.studies.study import save_base
    from deltafl.experiments.suite_runs import Bench, preflight, run_suite
    from deltafl.files import check_output, write_files
    from deltafl.models import load_net
    from deltafl.report import comparison_page, page_files
    from deltafl.tasks import ImageInput, load_task
    from deltafl.training.record import write_json
    from deltafl.training.tensorboard import METRICS, check_installed

    if tensorboard:
        check_installed()
    if not resume:
        check_output(out, overwrite=recipe.overwrite)
    net = None if bundled else load_net(recipe.model)
    inputs = ImageInput(IMAGE_SIZE, 1) if net is None else net.inputs
    if names:
        preflight(cells, load_task(recipe.data, inputs, recipe.seed), recipe.device)
    if study is not None and isinstance(inputs, ImageInput):
        check_data(study, studies, inputs.image_size, inputs.channels)
    if not resume:
        _clear(out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "suite.json").touch()
    with progress_by_stage(quiet=quiet) as show:
        if net is None:
            _pretrain(out / "base", recipe.seed, show)
            net = load_net(recipe.model)
        elif study is not None:
            save_base(net, out / "base")
        bench = Bench(
            net,
            lambda seed: load_task(recipe.data, inputs, seed),
            out / "runs",
            num_runs,
            out / METRICS if tensorboard else None,
        )
        suites = {name: run_suite(name, cells[name], bench, show) for name in names}
        found = run_studies(studies, study, jobs, out, show) if study is not None else {}
    if names and not any(s["runs"] for summaries in suites.values() for s in summaries):
        raise DeltaflError(
            *dict.fromkeys(s["failed"] for summaries in suites.values() for s in summaries)
        )
    model = "A small ViT, pre-trained on digits," if bundled else recipe.model
    data = ", ".join(
        dict.fromkeys(
            [recipe.data.data] * bool(names) + list(study.tasks if study is not None else [])
        )
    )
    result = {"model": model, "task": data, "metric": "accuracy", "num_runs": num_runs}
    page = comparison_page(result | {"suites": suites, "studies": found})
    write_files(out, page_files(page))
    write_json(out / "suite.json", result | {"suites": suites, "studies": found})
    if not quiet:
        for table in page.tables:
            click.echo(f"{table.caption}\n\n{as_text(table)}\n")
        click.echo(f"report: {out / 'report.html'}")


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
