"""The one-shot studies of `deltafl suite`: their options, and how they are run and written."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

import click

from deltafl.errors import DeltaflError
from deltafl.experiments.studies.options import BUNDLED, QUICK, StudyOptions
from deltafl.models.heads import HEAD_FILE

HELP = {
    "tasks": "Data sets, each as --data takes one.",
    "lr_values": "Learning rates; studies of one training use the second.",
    "steps_values": "Numbers of steps; studies of one training use the largest.",
    "draws": "Merges of one kind and seed in training-heterogeneity.",
    "methods": "What is compared. Default: every rule.",
    "scaling_coefs": "Grid of lambda. Default: 0.05 0.1 .. 2.",
    "search_strategy": "Of lambda and rho: racing (within each method) or exhaustive.",
    "val_limit": "At most so many validation examples of each task judge a merge.",
    "test_limit": "At most so many test examples of each task.",
    "control": "The task that negation must not harm. Default: the last of --tasks.",
    "domains": "Two data sets with the same classes, for the analogy.",
    "split": "The data set whose classes are dealt to several models. Default: the last of --tasks.",
    "jobs": "Pieces of work at a time, one core each. Default: one for each core; 1 on a GPU.",
}

TRAINED = frozenset(
    (
        "batch_size",
        "weight_decay",
        "grad_clip",
        "label_smoothing",
        "head",
        "few_shot",
        "templates",
        "mixed_precision",
    )
) | {"seed"}
"""Options of federated runs that fine-tunes take too, where they are given."""


def study_options(command: Any) -> Any:
    """Decorator: one option for each field of StudyOptions."""
    for name, kind, several in reversed(_kinds()):
        flag = f"--{name.replace('_', '-')}"
        text = f"One-shot studies: {HELP[name][0].lower()}{HELP[name][1:]}"
        command = click.option(flag, name, type=kind, multiple=several, default=None, help=text)(
            command
        )
    return command


def study_keys() -> dict[str, tuple[Any, Any]]:
    """The same as keys of a YAML file: name -> type, default."""
    defaults = StudyOptions()
    return {
        name: (tuple[kind, ...] if several else kind | None, value)
        for name, kind, several in _kinds()
        for value in [getattr(defaults, name)]
    }


def study_defaults(*, quick: bool, bundled: bool) -> dict[str, Any]:
    """What `--quick`, and the bundled base, put below everything that is given."""
    return (dict(QUICK) if quick else {}) | (dict(BUNDLED) if bundled else {})


def study_of(held: Mapping[str, Any]) -> StudyOptions:
    """The options among the settings."""
    given: dict[str, Any] = {
        name: tuple(held[name]) if several else held[name] for name, _, several in _kinds()
    }
    return StudyOptions(**given)


def _kinds() -> list[tuple[str, Any, bool]]:
    """Name, type of one value, and whether there are several."""
    hints = get_type_hints(StudyOptions)
    found = []
    for field in fields(StudyOptions):
        parts = get_args(hints[field.name])
        kind = next(k for k in (parts or (hints[field.name],)) if k is not type(None))
        found.append((field.name, kind, Ellipsis in parts))
    return found


def make_study(
    names: Sequence[str],
    held: Mapping[str, Any],
    explicit: Mapping[str, Any],
    num_runs: int,
    *,
    bundled: bool,
) -> Any:
    """The Study of the settings `held`; `explicit`: those that were given, by option or file.

    Raises:
        DeltaflError: every mistake.
    """
    import torch

    from deltafl.experiments.studies.study import Study
    from deltafl.merge.search import check_strategy
    from deltafl.training import TrainingRecipe

    options = study_of(held)
    base = Path(held["out"]) / "base"
    small = {"batch_size": 32, "head": str(base / HEAD_FILE)} if bundled else {}
    problems = options.problems(names)
    given = {k: v for k, v in explicit.items() if k in TRAINED}
    try:
        recipe = TrainingRecipe.of(**{"model": str(base), "data": "", "steps": 0, **small, **given})
    except DeltaflError as error:
        raise DeltaflError(*problems, *error.problems) from None
    if problems:
        raise DeltaflError(*problems)
    check_strategy(options.search_strategy, 0.95)
    return Study(
        base=str(base),
        folder=Path(held["out"]) / "studies",
        tasks=options.tasks,
        recipe=recipe,
        lrs=options.lr_values,
        steps=options.steps_values,
        methods=options.grids(),
        lambdas=options.scaling_coefs,
        control=options.control or options.tasks[-1],
        domains=options.domains,
        split=options.split or options.tasks[-1],
        draws=options.draws,
        strategy=options.search_strategy,
        val_limit=options.val_limit,
        test_limit=options.test_limit,
        num_runs=num_runs,
        limit=held["limit"],
        data_dir=held["data_dir"],
        device=held["device"] or ("cuda" if torch.cuda.is_available() else "cpu"),
    )


def check_data(study: Any, names: Sequence[str], image_size: int, channels: int) -> None:
    """Raise DeltaflError with what is wrong with any data set of the studies, before anything is written."""
    from deltafl.tasks.arrays import load_arrays

    specs = [*study.tasks]
    specs += [study.control] if "negation" in names else []
    specs += [study.split] if "data-heterogeneity" in names else []
    specs += study.domains if "analogy" in names else []
    look = {
        "image_size": image_size,
        "channels": channels,
        "seed": study.recipe.seed,
        "limit": study.limit,
    }
    found, problems = {}, []
    for spec in dict.fromkeys(specs):
        try:
            found[spec] = load_arrays(spec, **look, data_dir=study.data_dir)
        except DeltaflError as error:
            problems += error.problems
    by_name: dict[str, list[str]] = {}
    for spec in (s for s in study.tasks if s in found):
        by_name.setdefault(found[spec].name, []).append(spec)
    problems += [
        f'--tasks: {", ".join(same)} are all called "{n}"'
        for n, same in by_name.items()
        if len(same) > 1
    ]
    domains = [found[spec] for spec in study.domains if "analogy" in names and spec in found]
    if len({task.class_names for task in domains}) > 1:
        problems.append(
            f"analogy: {' and '.join(study.domains)} have other classes; give --domains with the same ones"
        )
    if problems:
        raise DeltaflError(*problems)


def run_studies(
    names: Sequence[str],
    study: Any,
    jobs: int | None,
    out: Path,
    show: Callable[[str, int, int], None],
) -> dict[str, Any]:
    """Name -> result, in order; each is written as soon as it is there."""
    from deltafl.experiments.studies.merging import Work
    from deltafl.experiments.studies.suites import STUDIES

    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    at_once = jobs or (cores if study.device == "cpu" else 1)
    found = {}
    for name in names:
        work = Work(
            study,
            at_once,
            lambda stage, done, total, name=name: show(f"{name}: {stage}", done, total),
        )
        found[name] = STUDIES[name](study, work)
    return found
