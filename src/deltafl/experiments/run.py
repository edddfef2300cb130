"""Run suites and studies: check everything, sweep their cells, sum them up, write the report."""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch

from deltafl.errors import DeltaflError
from deltafl.experiments.arithmetic import analogy, analogy_rows, negation, negation_rows
from deltafl.experiments.language import language, language_rows
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
from deltafl.experiments.rivals import examples, examples_rows
from deltafl.experiments.study import Data, Study, base_net, task_of
from deltafl.experiments.suites import SUITES, suite_cells, suite_rows
from deltafl.experiments.sweep import Cell, Found, Result, Store, points_of, require_done, sweep
from deltafl.files import check_output, write_files
from deltafl.models import HEAD_FILE, Net
from deltafl.progress import OnProgress, ignore
from deltafl.report import comparison_page, page_files
from deltafl.tasks.task import hash_of
from deltafl.training import TRAINING_JSON, TrainingRecipe
from deltafl.training.finetune import write_model
from deltafl.training.record import write_json
from deltafl.training.tensorboard import METRICS, check_installed, write_rows

STUDIES: Mapping[str, tuple[Callable[..., list[Cell]], Callable[[Found], Result]]] = {
    "training-heterogeneity": (training_heterogeneity, training_rows),
    "data-heterogeneity": (data_heterogeneity, data_rows),
    "scaling-coef": (scaling_coef, scaling_rows),
    "examples": (examples, examples_rows),
    "language": (language, language_rows),
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
    by its content. training: of the fine-tunes. With `resume` what is there is kept, and a killed
    suite goes on.

    Raises:
        DeltaflError: what can be told before anything has changed; or no run could be made.
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
    made = partial(Study, base, net.inputs, recipe.study)
    studies = [made(training.replace(seed=seed)) for seed in recipe.seeds]
    jobs = recipe.study.jobs or (torch.get_num_threads() if studies[0].device == "cpu" else 1)
    chosen = [name for name in names if name in STUDIES]
    data = [recipe.data.data] * (len(chosen) < len(names)) + [*recipe.study.tasks] * bool(chosen)
    suites = {name: suite_cells(name, recipe, net.inputs) for name in names if name in SUITES}
    if chosen:
        studies[0].check(chosen)
    if not resume:
        check_output(out, overwrite=recipe.overwrite)
        shutil.rmtree(out, ignore_errors=True)
    _make_base(Path(base), net, None if model else recipe.seed, on_progress)
    store, found = Store(out / "works"), dict[str, Found]()
    for name in names:
        swept = partial(sweep, store=store, jobs=jobs, name=f"{name}: ", on_progress=on_progress)
        cells = suites.get(name) or [c for study in studies for c in STUDIES[name][0](study, swept)]
        found[name] = list(zip(cells, swept([cell.work for cell in cells]), strict=True))
        if name in chosen:
            require_done([one for _, one in found[name]])
    runs = [one for name in suites for _, one in found[name]]
    if all("failed" in one for one in runs):
        require_done(runs)
    for name in suites if recipe.tensorboard else ():
        _write_metrics(out / METRICS / name, found[name])
    result = {
        "model": model or "A small ViT, pre-trained on digits,",
        "task": ", ".join(dict.fromkeys(data)),
        "metric": task_of(studies[0], Data(data[0])).metric,
        "num_runs": recipe.num_runs,
        "suites": {name: _told(found[name], suite_rows) for name in suites},
        "studies": {name: _told(found[name], STUDIES[name][1]) for name in chosen},
    }
    write_files(out, page_files(comparison_page(result)))
    write_json(out / "suite.json", result)
    return result


def _told(found: Found, rows: Callable[[Found], Result]) -> Result:
    """The rows of an experiment, the points behind them, and what failed or was left out."""
    notes = {f"{cell.name}: {one['failed']}" for cell, one in found if "failed" in one}
    left_out = (one.get("left_out", {}).items() for _, one in found)
    notes |= {f"{rule}: {why}" for items in left_out for rule, why in items}
    points = points_of(found).to_dict("records")
    return {**rows(found), "points": points, "notes": sorted(notes)}


def _write_metrics(folder: Path, found: Found) -> None:
    for cell, run in found:
        if "rows" in run:
            seed = run["points"][0]["seed"]
            write_rows(run["rows"], folder / cell.name / f"seed-{seed}")


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
