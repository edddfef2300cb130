"""Run suites and studies: check everything, sweep their cells, sum them up, write the report."""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from deltafl.errors import DeltaflError
from deltafl.experiments.arithmetic import analogy, analogy_rows, negation, negation_rows
from deltafl.experiments.merges import (
    data_heterogeneity,
    data_rows,
    scaling_coef,
    scaling_rows,
    training_heterogeneity,
    training_rows,
)
from deltafl.experiments.quickstart import new_base, pretrain
from deltafl.experiments.recipe import SuiteRecipe
from deltafl.experiments.study import Data, Study, base_net, task_of
from deltafl.experiments.suites import SUITES, suite_cells, suite_rows
from deltafl.experiments.sweep import Cell, Found, Result, Store, points_of, require_done, sweep
from deltafl.files import check_output, write_files
from deltafl.models import HEAD_FILE, Net
from deltafl.progress import OnProgress, Progress, ignore
from deltafl.report import comparison_page, page_files
from deltafl.tasks.task import hash_of
from deltafl.training import TRAINING_JSON, TrainingRecipe
from deltafl.training.finetune import write_model
from deltafl.training.record import write_json
from deltafl.training.tensorboard import METRICS, check_installed, write_rows

STUDIES: Mapping[str, tuple[Callable[..., list[Cell]], Callable[..., Result]]] = {
    "training-heterogeneity": (training_heterogeneity, training_rows),
    "data-heterogeneity": (data_heterogeneity, data_rows),
    "scaling-coef": (scaling_coef, scaling_rows),
    "negation": (negation, negation_rows),
    "analogy": (analogy, analogy_rows),
}
"""Name -> the cells of a study for one seed, (study, sweep) -> cells, and what is told of all that
was found, Found -> the rows of the table and more.
"""


def run_suites(
    names: Sequence[str],
    recipe: SuiteRecipe,
    training: TrainingRecipe,
    *,
    resume: bool = False,
    on_progress: OnProgress = ignore,
) -> Result:
    """Run suites of federated runs and studies of merges by name. `recipe.out` gets suite.json,
    report.html, a folder of tables and figures for each, the base model, and in works/ every result
    by its content.

    training: of the fine-tunes. With `resume` what is there is kept, and a killed suite goes on.

    Raises:
        DeltaflError: what can be told before anything runs, and then nothing has changed; or no run
            could be made.
    """
    out, model = Path(recipe.out or "deltafl-suite"), recipe.model
    base = str(out / "base")
    if recipe.tensorboard:
        check_installed()
    net = base_net(model) if model else new_base(recipe.seed)
    if not model:
        given = "head" in recipe.head.model_fields_set
        head = {} if given else {"head": f"{base}/{HEAD_FILE}"}
        recipe, training = recipe.replace(model=base, **head), training.replace(**head)
    trainings = (training.replace(seed=seed) for seed in recipe.seeds)
    studies = [Study(base, net.inputs, recipe.study, one) for one in trainings]
    jobs = recipe.study.jobs or (torch.get_num_threads() if studies[0].device == "cpu" else 1)
    chosen = [name for name in names if name in STUDIES]
    data = [recipe.data.data] * (len(chosen) < len(names)) + [*recipe.study.tasks] * bool(chosen)
    if "" in data:
        raise DeltaflError("data is missing; name it with --data")
    suites = {name: suite_cells(name, recipe, net.inputs) for name in names if name in SUITES}
    if chosen and (problems := dict.fromkeys(studies[0].problems(chosen))):
        raise DeltaflError(*problems)
    if not resume:
        check_output(out, overwrite=recipe.overwrite)
        shutil.rmtree(out, ignore_errors=True)
    _make_base(Path(base), net, None if model else recipe.seed, on_progress)
    told: dict[str, dict[str, Result]] = {"suites": {}, "studies": {}}
    runs: list[Result] = []
    for name in names:
        show = partial(_show, name, on_progress)
        swept = partial(sweep, store=Store(out / "works"), jobs=jobs, on_progress=show)
        if name in suites:
            kind, cells, rows = "suites", suites[name], suite_rows
        else:
            kind, (make, rows) = "studies", STUDIES[name]
            cells = [cell for study in studies for cell in make(study, swept)]
        results = swept([cell.work for cell in cells])
        if name in suites:
            runs += results
        else:
            require_done(results)
        found = list(zip(cells, results, strict=True))
        if recipe.tensorboard:
            _write_metrics(out / METRICS / name, found)
        told[kind][name] = {**_told(found), **rows(found)}
    if all("failed" in run for run in runs):
        require_done(runs)
    result = {
        "model": model or "A small ViT, pre-trained on digits,",
        "task": ", ".join(dict.fromkeys(data)),
        "metric": task_of(studies[0], Data(data[0])).metric,
        "num_runs": recipe.num_runs,
        **told,
    }
    write_files(out, page_files(comparison_page(result)))
    write_json(out / "suite.json", result)
    return result


def _show(name: str, on_progress: OnProgress, progress: Progress) -> None:
    on_progress(replace(progress, name=f"{name}: {progress.name}"))


def _told(found: Found) -> Result:
    """The points, and what failed or was left out."""
    notes = {f"{cell.name}: {one['failed']}" for cell, one in found if "failed" in one}
    left_out = (one.get("left_out", {}).items() for _, one in found)
    notes |= {f"{rule}: {why}" for items in left_out for rule, why in items}
    return {"points": points_of(found).to_dict("records"), "notes": sorted(notes)}


def _write_metrics(folder: Path, found: Found) -> None:
    for cell, one in found:
        for point in one.get("points", ()) if "rows" in one else ():
            write_rows(one["rows"], folder / cell.name / f"seed-{point['seed']}")


def _make_base(base: Path, net: Net, seed: int | None, on_progress: OnProgress) -> None:
    """The base model in its folder; seed: it is the quickstart's, still to be trained.

    Raises:
        DeltaflError: another model is there.
    """
    base.parent.mkdir(parents=True, exist_ok=True)
    (base.parent / "suite.json").touch()
    about = base / TRAINING_JSON
    key, value = ("hash", hash_of(net.flat.detach())) if seed is None else ("seed", seed)
    if about.is_file():
        if json.loads(about.read_text()).get(key) != value:
            other = f'"{net.origin}"' if seed is None else f"that of seed {seed}"
            raise DeltaflError(
                f'"{base}" is another model than {other}; choose another --out, or --overwrite'
            )
    elif seed is None:
        write_model(base, net, {"base": {"id": net.origin}, key: value})
    else:
        pretrain(base, seed, on_progress)
