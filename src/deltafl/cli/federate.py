"""`deltafl federate`."""

from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import click

from deltafl.cli.options import (
    ManyValues,
    as_bytes,
    progress_by_stage,
    rule_options,
    rule_parameter_names,
    table,
)
from deltafl.cli.settings import read_settings, recipe_options
from deltafl.errors import DeltaflError
from deltafl.federated.recipe import FederatedRecipe

HELP = {
    "num_clients": "K.",
    "participation_rate": "C, the share of clients in each round.",
    "local_steps": "J, optimiser steps of a client in a round.",
    "local_steps_spread": "S: a client's own steps are between J/S and J S.",
    "num_rounds": "Rounds.",
    "batch_size": "Of a local step.",
    "lr": "Local learning rate.",
    "momentum": "Of local SGD; it starts anew in each round.",
    "weight_decay": "Of local SGD.",
    "nesterov": "Nesterov momentum in local SGD.",
    "grad_clip": "Largest gradient norm, over the kept coordinates.",
    "label_smoothing": "Of the training loss.",
    "lr_schedule": "Of the local learning rate, over rounds: constant, cosine, linear or step.",
    "augment": "none, flip or crop_flip, of training images only.",
    "local_algorithm": "sgd, fedprox or scaffold.",
    "prox_mu": "Of fedprox.",
    "sharding": "iid, non_iid or dirichlet.",
    "nc": "For non_iid: classes per client.",
    "allow_missing_classes": "For non_iid: leave classes out if need be.",
    "alpha": "For dirichlet: small is uneven.",
    "aggregator": "Any method of `deltafl rules`.",
    "client_weights": "What a rule weighs clients by: examples or uniform.",
    "server_optimizer": "sgd, fedadam, fedyogi or fedadagrad.",
    "server_lr": "Of the server's step.",
    "server_momentum": "Of the server's optimiser. Default: 0 for sgd, 0.9 for the others.",
    "server_beta2": "Of fedadam and fedyogi.",
    "server_tau": "Of the adaptive server optimisers.",
    "head": "ridge, probe, linear, zero-shot (CLIP) or a head.safetensors.",
    "few_shot": "Fit the ridge head on so many examples per class only.",
    "templates": "Prompts for the zero-shot head: a file, one on each line, {} for the class.",
    "train_head": "Train the head in the rounds. Default: it is frozen.",
    "sparsity_ratio": "Share of frozen coordinates.",
    "mask_strategy": "least_sensitive, most_sensitive, lowest_magnitude, highest_magnitude or random.",
    "mask_scope": "global or per_layer.",
    "mask_file": "A mask that `deltafl mask` wrote, instead of a calibration.",
    "calibration": "average or progressive.",
    "calibration_rounds": "Rounds of scoring, each with fresh clients.",
    "calibration_examples": "Most examples that a client scores in a round.",
    "attenuate": "For progressive: factor of dropped weights while scoring.",
    "fisher_labels": "sampled, empirical or exact.",
    "fisher_draws": "Labels drawn for each example.",
    "eval_every": "Rounds between validations.",
    "patience": "Validations without a gain after which to stop.",
    "mixed_precision": "no or bf16.",
    "client": "Your own client, module:attr.",
    "seed": "Of everything that is random.",
}
EXTRA: dict[str, tuple[Any, Any]] = {
    "model": (str, ...),
    "data": (str, ...),
    "data_dir": (str | None, None),
    "out": (str, ...),
    "limit": (int | None, None),
    "device": (str | None, None),
}
WORKERS: dict[str, tuple[Any, Any]] = {"workers": (int | None, None)}
EXPERIMENTS = {
    "heterogeneity_experiment": "heterogeneity",
    "local_steps_experiment": "local-steps",
    "compare_strategies": "mask-strategies",
}


workers_option = click.option(
    "--workers",
    type=int,
    help="Processes that train clients; no result depends on it. Default: one a core.",
)


def task_options(command: Any) -> Any:
    """Decorator: model, data and where to run, shared by federate and suite."""
    options = [
        click.option(
            "--model",
            "--base",
            "model",
            help="Folder, hub id, module:attr, or a config.json for a new one.",
        ),
        click.option(
            "--data",
            help="The task: digits, a folder, a name (cifar100), hub:owner/name, module:attr.",
        ),
        click.option(
            "--data-dir",
            help="The folder that holds tasks by name; without it they come from the hub.",
        ),
        click.option("--limit", type=int, help="Keep at most so many examples of each split."),
        click.option("--device", help="cpu, cuda, cuda:1. Default: the GPU where there is one."),
        click.option(
            "--config",
            help="A YAML file with the same names (num_clients: 100); options go before it.",
        ),
    ]
    for option in reversed(options):
        command = option(command)
    return command


@click.command(cls=ManyValues)
@task_options
@click.option("--out", help="The folder to write.")
@recipe_options(FederatedRecipe, HELP, skip=("aggregator_params",))
@rule_options("seed")
@workers_option
@click.option(
    "--save-client-updates",
    multiple=True,
    help="Rounds (or all) whose clients' models are written.",
)
@click.option(
    "--heterogeneity-experiment", is_flag=True, help="Run `deltafl suite heterogeneity` instead."
)
@click.option(
    "--local-steps-experiment", is_flag=True, help="Run `deltafl suite local-steps` instead."
)
@click.option(
    "--compare-strategies", is_flag=True, help="Run `deltafl suite mask-strategies` instead."
)
@click.option("--tensorboard", is_flag=True, help="Write OUT/metrics for TensorBoard too.")
@click.option("--resume", is_flag=True, help="Continue a run that was killed.")
@click.option("--overwrite", is_flag=True, help="Replace an existing output.")
@click.option("--quiet", is_flag=True, help="No progress, no summary.")
def federate(
    config: str | None,
    save_client_updates: tuple[str, ...],
    tensorboard: bool,
    resume: bool,
    overwrite: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Federated training of a pre-trained model, test once, write the best model and report.html.

    \b
    deltafl federate --model facebook/dino-vits16 --data hub:tanganke/cifar100 --sharding non_iid --nc 5 --out DIR
    """
    from deltafl.training.tensorboard import check_installed, write_scalars

    if tensorboard:
        check_installed()
    asked = [name for flag, name in EXPERIMENTS.items() if options.pop(flag)]
    held = federate_settings(config, options)
    if asked:
        from deltafl.cli.suite import run_suites

        run_suites(
            asked, held, tensorboard=tensorboard, resume=resume, overwrite=overwrite, quiet=quiet
        )
        return
    recipe = recipe_of(held)
    rounds = _rounds(save_client_updates, recipe.num_rounds)
    from deltafl.federated import federate as run
    from deltafl.files import check_output

    if not resume:
        check_output(held["out"], overwrite=overwrite)
    encoder, task = load_model_and_task(held, recipe.seed)
    with round_progress(quiet=quiet) as on_round:
        done = run(
            encoder,
            task,
            recipe,
            held["out"],
            resume=resume,
            overwrite=overwrite,
            device=held["device"],
            workers=held["workers"],
            save_client_updates=rounds,
            on_round=on_round,
        )
    write_report(done.out, done.result, done.rows)
    if tensorboard:
        write_scalars(done.out)
    if not quiet:
        click.echo(summary(done.result, done.out))


def federate_settings(
    config: str | None,
    options: Mapping[str, Any],
    defaults: Mapping[str, Any] | None = None,
    extra: Mapping[str, tuple[Any, Any]] = EXTRA,
) -> dict[str, Any]:
    """Every setting: `defaults`, the file, the options on top; parameters of rules go to aggregator_params."""
    names = rule_parameter_names() - {"seed"}
    given = {key: value for key, value in options.items() if value is not None}
    params = {key: given.pop(key) for key in names & given.keys()}
    held = read_settings(FederatedRecipe, config, given, {**extra, **WORKERS}, defaults)
    held["aggregator_params"] = dict(held["aggregator_params"]) | params
    return held


def recipe_of(held: dict[str, Any]) -> FederatedRecipe:
    """The recipe among the settings. Raises DeltaflError with every mistake."""
    recipe = FederatedRecipe(**{f.name: held[f.name] for f in fields(FederatedRecipe)})
    if problems := recipe.problems():
        raise DeltaflError(*problems)
    return recipe


def load_model_and_task(held: Mapping[str, Any], seed: int) -> tuple[Any, Any]:
    """The encoder, and the task in the size that it takes."""
    encoder = load_encoder_of(held)
    return encoder, load_task_of(held, encoder, seed)


def load_encoder_of(held: Mapping[str, Any]) -> Any:
    """The encoder that the settings name."""
    from deltafl.models import load_encoder

    return load_encoder(held["model"])


def load_task_of(held: Mapping[str, Any], encoder: Any, seed: int) -> Any:
    """The task that the settings name, in the size that the encoder takes, with the validation split of a seed."""
    from deltafl.tasks.arrays import load_arrays

    size, channels = encoder.input.image_size, encoder.input.channels
    return load_arrays(
        held["data"],
        image_size=size,
        channels=channels,
        seed=seed,
        limit=held["limit"],
        data_dir=held["data_dir"],
    )


@contextmanager
def round_progress(*, quiet: bool) -> Any:
    """A bar with rounds and remaining time; yields what `federate` calls after each."""
    with progress_by_stage(quiet=quiet) as show:

        def on_round(row: Any, total: int) -> None:
            seen = "" if row.get("val_score") is None else f", validation {row['val_score']:.1%}"
            show("rounds" + seen if total == row["round"] else "rounds", row["round"], total)

        yield on_round


def write_report(out: Path, result: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> None:
    """OUT/report.html and OUT/figure.png."""
    from deltafl.files import write_files
    from deltafl.report import page_files, run_page

    write_files(out, page_files(run_page(result, rows)))


def summary(result: Mapping[str, Any], out: Path) -> str:
    """What came out, in a small table."""
    facts = [
        ("test accuracy", f"{result['test_score']:.2%} of {result['test_examples']}"),
        ("validation accuracy", f"{result['val_score']:.2%} after round {result['best_round']}"),
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


def _rounds(values: tuple[str, ...], num_rounds: int) -> set[int]:
    if "all" in values:
        return set(range(1, num_rounds + 1))
    wrong = [v for v in values if not v.isdecimal() or not 1 <= int(v) <= num_rounds]
    if wrong:
        raise DeltaflError(
            f"--save-client-updates: {', '.join(wrong)}; name rounds from 1 to {num_rounds}, or all"
        )
    return {int(v) for v in values}
