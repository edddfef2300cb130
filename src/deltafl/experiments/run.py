"""Run suites and studies: check everything, sweep their cells, sum them up, write the report."""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any, ClassVar

import torch

from deltafl.algebra.tensors import device_named
from deltafl.errors import DeltaflError
from deltafl.experiments.arithmetic import analogy, analogy_rows, negation, negation_rows
from deltafl.experiments.heterogeneity import (
    data_heterogeneity,
    data_rows,
    scaling_coef,
    scaling_rows,
    training_heterogeneity,
    training_rows,
)
from deltafl.experiments.quickstart import new_base, pretrain
from deltafl.experiments.recipe import SuiteRecipe
from deltafl.experiments.study import Study, base_hash, base_net
from deltafl.experiments.suites import SUITES
from deltafl.experiments.sweep import Cell, Result, Store, Sweep, Work, sweep
from deltafl.federated import FederatedRecipe, federate
from deltafl.federated.setup import make_shards
from deltafl.files import atomic_folder, check_output, write_files
from deltafl.models import HEAD_FILE, Net
from deltafl.progress import OnProgress, Progress, ignore
from deltafl.report import comparison_page, page_files
from deltafl.tasks import ImageTask, Task, load_task
from deltafl.tasks.task import hash_of
from deltafl.training import TRAINING_JSON, TrainingRecipe
from deltafl.training.record import write_json
from deltafl.training.tensorboard import METRICS, check_installed, write_rows
from deltafl.usercode import find_callable

Rows = Callable[[Study, Sequence[Cell], Sequence[Result]], dict[str, Any]]

STUDIES: Mapping[str, tuple[Callable[[Study, Sweep], list[Cell]], Rows]] = {
    "training-heterogeneity": (training_heterogeneity, training_rows),
    "data-heterogeneity": (data_heterogeneity, data_rows),
    "scaling-coef": (scaling_coef, scaling_rows),
    "negation": (negation, negation_rows),
    "analogy": (analogy, analogy_rows),
}
"""Name -> the cells of a study, and what its tables show of their results."""


@dataclass(frozen=True, eq=False)
class FederatedWork(Work):
    """A federated run."""

    recipe: FederatedRecipe
    kind: ClassVar[str] = "runs"
    alone: ClassVar[bool] = True

    @property
    def task(self) -> Task:
        """What it trains on."""
        return load_task(self.recipe.data, base_net(self.recipe.model).inputs, self.recipe.seed)

    def check(self, net: Net) -> None:
        """Raise DeltaflError with what the run could only say when its turn comes."""
        if self.recipe.device is not None:
            device_named(self.recipe.device)
        if self.recipe.local.client is not None:
            find_callable(self.recipe.local.client, "client")
        make_shards(load_task(self.recipe.data, net.inputs, self.recipe.seed), self.recipe)

    def content(self, store: Store) -> Mapping[str, Any]:
        recipe = self.recipe.content()
        for key in ("model", "data"):
            del recipe[key]
        data = self.recipe.data.model_dump(include={"augment", "label_smoothing"})
        model = base_hash(self.recipe.model)
        return {**recipe, "data": data, "model": model, "task": self.task.fingerprint()}

    def title(self) -> str:
        return f"{self.task.name}-seed{self.recipe.seed}"

    def run(self, folder: Path, store: Store) -> Result:
        recipe = self.recipe.replace(out=str(folder), overwrite=True)
        run = federate(base_net(recipe.model), self.task, recipe, resume=True)
        return {"result": run.result, "rows": run.rows}


def run_suites(
    names: Sequence[str],
    recipe: SuiteRecipe,
    training: TrainingRecipe,
    *,
    resume: bool = False,
    on_progress: OnProgress = ignore,
) -> dict[str, Any]:
    """Run suites of federated runs and studies of merges by name. `recipe.out` gets suite.json,
    report.html, a folder of tables and figures for each, the base model, and in works/ every result by
    its content.

    training: of the fine-tunes. With `resume` what is there is kept, and a killed suite goes on.

    Raises:
        DeltaflError: what can be told before anything runs, and then nothing has changed; or no run
            could be made.
    """
    out, bundled = Path(recipe.out or "deltafl-suite"), recipe.bundled
    model, base = recipe.model, out / "base"
    if recipe.tensorboard:
        check_installed()
    if bundled:
        net, given = new_base(recipe.seed), "head" in recipe.head.model_fields_set
        head = {} if given else {"head": str(base / HEAD_FILE)}
        recipe, training = recipe.replace(model=str(base), **head), training.replace(**head)
    else:
        net = base_net(model)
    suites = {name: _cells(name, recipe) for name in names if name in SUITES}
    if suites and not recipe.data.data:
        raise DeltaflError("data is missing; name it with --data")
    study, studies = _study(recipe, training, str(base)), [n for n in names if n in STUDIES]
    _check(suites, study, studies, net)
    data = [recipe.data.data] * bool(suites) + [*study.tasks] * bool(studies)
    if not resume:
        check_output(out, overwrite=recipe.overwrite)
        shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True, exist_ok=True)
    (out / "suite.json").touch()
    _make_base(base, net, recipe.seed if bundled else None, on_progress)

    run = partial(_swept, recipe, Store(out / "works"), study.device, on_progress)
    result = {
        "model": "A small ViT, pre-trained on digits," if bundled else model,
        "task": ", ".join(dict.fromkeys(data)),
        "metric": load_task(recipe.data.replace(data=data[0]), net.inputs, recipe.seed).metric,
        "num_runs": recipe.num_runs,
        "suites": {},
        "studies": {},
    }
    for name, cells in suites.items():
        found = run(name, [cell.work for cell in cells])
        result["suites"][name] = _summaries(cells, found)
        if recipe.tensorboard:
            _write_metrics(out / METRICS / name, cells, found)
    for name in studies:
        cells = STUDIES[name][0](study, partial(run, name))
        found = run(name, [cell.work for cell in cells])
        if failed := [one["failed"] for one in found if "failed" in one]:
            raise DeltaflError(*dict.fromkeys(failed))
        result["studies"][name] = STUDIES[name][1](study, cells, found)
    summaries = [s for rows in result["suites"].values() for s in rows]
    if summaries and not any(s["runs"] for s in summaries):
        raise DeltaflError(*dict.fromkeys(s["failed"] for s in summaries))
    write_files(out, page_files(comparison_page(result)))
    write_json(out / "suite.json", result)
    return result


def _swept(
    recipe: SuiteRecipe,
    store: Store,
    device: str,
    on_progress: OnProgress,
    name: str,
    works: Sequence[Work],
) -> list[Result]:
    jobs = recipe.study.jobs or (torch.get_num_threads() if device == "cpu" else 1)

    def show(progress: Progress) -> None:
        on_progress(replace(progress, name=f"{name}: {progress.name}"))

    return sweep(works, store, jobs=jobs, on_progress=show)


def _cells(name: str, recipe: SuiteRecipe) -> list[Cell[FederatedWork]]:
    """One cell for each row of a suite and seed. Raises DeltaflError with every mistake of a row."""
    base = FederatedRecipe(
        **{field: getattr(recipe, field) for field in FederatedRecipe.model_fields}
    )
    return [
        Cell(labels, FederatedWork(row.replace(seed=seed)))
        for labels, row in SUITES[name](base, recipe.values)
        for seed in range(recipe.seed, recipe.seed + recipe.num_runs)
    ]


def _study(recipe: SuiteRecipe, training: TrainingRecipe, base: str) -> Study:
    study, seed = recipe.study, training.seed
    last = study.tasks[-1] if study.tasks else ""
    return Study(
        base=base,
        tasks=study.tasks,
        training=training,
        lrs=study.lr_values,
        steps=study.steps_values,
        methods=study.grids(),
        lambdas=study.scaling_coefs,
        control=study.control or last,
        domains=study.domains,
        split=study.split or last,
        seeds=tuple(range(seed, seed + recipe.num_runs)),
        draws=study.draws,
        strategy=study.search_strategy,
        val_limit=study.val_limit,
        test_limit=study.test_limit,
        device=str(device_named(recipe.device)),
    )


def _check(
    suites: Mapping[str, Sequence[Cell[FederatedWork]]],
    study: Study,
    studies: Sequence[str],
    net: Net,
) -> None:
    """Raise DeltaflError with what some run could only say when its turn comes: shards that cannot be
    dealt, data sets that are not there, have one name, or other classes than they should.
    """
    problems: dict[str, str] = {}
    for name, cell in ((name, cell) for name, cells in suites.items() for cell in cells):
        try:
            cell.work.check(net)
            if name != "aggregators":  # its own choice: there the row says so
                cell.work.recipe.check_rule()
        except DeltaflError as error:
            for line in error.problems:
                problems.setdefault(line, f"{name}, {cell.name}: {line}")
    specs = {*study.tasks} if studies else set()
    specs |= {study.control} if "negation" in studies else set()
    specs |= {study.split} if "data-heterogeneity" in studies else set()
    specs |= {*study.domains} if "analogy" in studies else set()
    tasks: dict[str, Task] = {}
    for spec in sorted(specs):
        try:
            tasks[spec] = load_task(
                study.training.data.replace(data=spec), net.inputs, study.training.seed
            )
        except DeltaflError as error:
            problems |= {line: line for line in error.problems}
    called: dict[str, list[str]] = {}
    for spec in (spec for spec in study.tasks if spec in tasks):
        called.setdefault(tasks[spec].name, []).append(spec)
    for name, same in called.items():
        if len(same) > 1:
            line = f'--tasks: {", ".join(same)} are all called "{name}"'
            problems[line] = line
    shared = [tasks[spec] for spec in study.domains if spec in tasks]
    names = {task.class_names for task in shared if isinstance(task, ImageTask)}
    if "analogy" in studies and len(names) > 1:
        both = " and ".join(study.domains)
        line = f"analogy: {both} have other classes; give --domains with the same ones"
        problems[line] = line
    if problems:
        raise DeltaflError(*problems.values())


def _make_base(base: Path, net: Net, seed: int | None, on_progress: OnProgress) -> None:
    """The base model in its folder; seed: it is the quickstart's, still to be trained.

    Raises:
        DeltaflError: another model is there.
    """
    about = base / TRAINING_JSON
    made = json.loads(about.read_text()) if about.is_file() else None
    if made is None and seed is not None:
        pretrain(base, seed, on_progress)
    elif made is None:
        with atomic_folder(base) as folder:
            net.save(folder)
            origin = {"base": {"id": net.origin}, "hash": hash_of(net.flat.detach())}
            (folder / TRAINING_JSON).write_text(json.dumps(origin))
    elif seed is not None and made.get("seed") != seed:
        raise DeltaflError(
            f'"{base}" was made with seed {made.get("seed")}, now it is {seed}; choose another --out, '
            "or --overwrite"
        )
    elif seed is None and made.get("hash") != hash_of(net.flat.detach()):
        raise DeltaflError(
            f'"{base}" is another model than "{net.origin}"; choose another --out, or --overwrite'
        )


def _summaries(cells: Sequence[Cell], found: Sequence[Result]) -> list[dict[str, Any]]:
    """For each row: labels, mean and spread of test scores over seeds, bytes, the mean curves."""
    rows: dict[str, list[Result]] = {}
    for cell, result in zip(cells, found, strict=True):
        rows.setdefault(cell.name, []).append(result)
    labels = {cell.name: dict(cell.labels) for cell in cells}
    return [{"labels": labels[name], "name": name, **_summary(rows[name])} for name in rows]


def _summary(found: Sequence[Result]) -> dict[str, Any]:
    """Of one row; spread: sample standard deviation over seeds, None for one run."""
    failed = next((result["failed"] for result in found if "failed" in result), None)
    runs = [result for result in found if "failed" not in result]
    if not runs:
        return {"runs": 0, "failed": failed}
    results = [run["result"] for run in runs]
    tests = [result["test_score"] for result in results]
    return {
        "runs": len(runs),
        "failed": failed,
        "test": mean(tests),
        "spread": stdev(tests) if len(tests) > 1 else None,
        "val": mean(result["val_score"] for result in results),
        "best_round": mean(result["best_round"] for result in results),
        "megabytes_up": mean(result["bytes_up_total"] for result in results) / 1e6,
        "seconds": sum(result["client_seconds"] + result["server_seconds"] for result in results),
        "left_out": sum(result["failed_updates"] for result in results),
        "by_round": _mean_curve([run["rows"] for run in runs], "round"),
        "by_bytes": _mean_curve([run["rows"] for run in runs], "bytes_up_total"),
    }


def _mean_curve(runs: Sequence[Sequence[Mapping[str, Any]]], key: str) -> list[tuple[float, float]]:
    """(mean of `key`, mean validation score) over runs, at the rounds that every run validated."""
    by_round = [{r["round"]: r for r in rows if r["val_score"] is not None} for rows in runs]
    shared = sorted(set.intersection(*(set(rows) for rows in by_round)))
    return [
        (
            mean(rows[n].get(key, 0) for rows in by_round),
            mean(rows[n]["val_score"] for rows in by_round),
        )
        for n in shared
    ]


def _write_metrics(
    folder: Path, cells: Sequence[Cell[FederatedWork]], found: Sequence[Result]
) -> None:
    for cell, result in zip(cells, found, strict=True):
        if "failed" not in result:
            write_rows(result["rows"], folder / cell.name / f"seed-{cell.work.recipe.seed}")
