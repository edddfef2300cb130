"""The suites of "Federated Learning Under the Lens of Task Arithmetic": which runs each one
compares.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import ClassVar

from deltafl.errors import DeltaflError
from deltafl.experiments.recipe import SuiteRecipe
from deltafl.experiments.study import Inputs, base_hash, base_net, settings_of
from deltafl.experiments.sweep import (
    Cell,
    Found,
    Result,
    Store,
    Work,
    mean_curves,
    points_of,
    tabulate,
)
from deltafl.federated import FederatedRecipe, federate
from deltafl.federated.setup import make_shards
from deltafl.rules.building import delta_rules
from deltafl.sparse.strategies import MASK_STRATEGIES
from deltafl.tasks import Task, load_task
from deltafl.usercode import find_callable

Rows = Iterator[tuple[Mapping[str, str | float], dict[str, object]]]
"""Labels of each row of a suite's table, and settings; every row is run with several seeds."""


def heterogeneity(recipe: SuiteRecipe) -> Rows:
    """FedAvg as clients hold fewer classes."""
    for label, own in (_iid(), *map(_classes, recipe.values.nc_values)):
        yield {"sharding": label}, own


def local_steps(recipe: SuiteRecipe) -> Rows:
    """More local steps and fewer rounds, the product being the same."""
    values = recipe.values
    for (label, own), j in product((_iid(), _classes(values.nc)), values.j_values):
        rounds = max(1, recipe.num_rounds * values.j_values[0] // j)
        labels = {"sharding": label, "J": j, "rounds": rounds}
        yield labels, {**own, "local_steps": j, "num_rounds": rounds}


def sparsity(recipe: SuiteRecipe) -> Rows:
    """Dense training and masks of growing sparsity."""
    for ratio in (0.0, *sorted(recipe.values.sparsity_ratios)):
        yield {"sparsity": ratio}, _sparse(recipe, ratio)


def calibration_rounds(recipe: SuiteRecipe) -> Rows:
    """Masks from one and from several rounds of scoring."""
    for kind, count in product(("average", "progressive"), recipe.values.calibration_values):
        own = {"calibration": kind, "calibration_rounds": count}
        yield {"calibration": kind, "R": count}, _sparse(recipe, recipe.values.sparsity) | own


def mask_strategies(recipe: SuiteRecipe) -> Rows:
    """Which coordinates to train, at one sparsity, against training all."""
    yield {"strategy": "dense"}, _sparse(recipe, 0.0)
    for name in MASK_STRATEGIES:
        own = {"mask_strategy": name}
        yield {"strategy": name}, _sparse(recipe, recipe.values.sparsity) | own


def aggregators(recipe: SuiteRecipe) -> Rows:
    """Every rule as the server, IID and not, with equal and unequal local steps."""
    rules, unset = delta_rules(), dict.fromkeys(recipe.server.params)
    spreads = ("equal", 1.0), ("unequal", recipe.values.steps_spread)
    for sharding, (steps, spread), name in product(
        (_iid(), _classes(recipe.values.nc)), spreads, rules
    ):
        labels = {"rule": name, "sharding": sharding[0], "local steps": steps}
        own = {"aggregator": name, "local_steps_spread": spread, **sharding[1]}
        yield labels, unset | rules[name].typical() | own


def _iid() -> tuple[str, dict[str, object]]:
    return "IID", {"sharding": "iid", "nc": None, "alpha": None}


def _classes(nc: int) -> tuple[str, dict[str, object]]:
    return f"Nc = {nc}", {"sharding": "non_iid", "nc": nc, "alpha": None}


def _sparse(recipe: SuiteRecipe, ratio: float) -> dict[str, object]:
    return {**_classes(recipe.values.nc)[1], "sparsity_ratio": ratio}


_ALL = heterogeneity, local_steps, sparsity, calibration_rounds, mask_strategies, aggregators
SUITES: Mapping[str, Callable[[SuiteRecipe], Rows]] = {
    suite.__name__.replace("_", "-"): suite for suite in _ALL
}


@dataclass(frozen=True, eq=False)
class FederatedWork(Work):
    """A federated run. Its point: what came out.

    inputs: what its model takes.
    """

    recipe: FederatedRecipe
    inputs: Inputs
    kind: ClassVar[str] = "runs"
    alone: ClassVar[bool] = True

    @property
    def task(self) -> Task:
        """What it trains on."""
        return load_task(self.recipe.data, self.inputs, self.recipe.seed)

    def content(self) -> Mapping[str, object]:
        model, task = base_hash(self.recipe.model), self.task.fingerprint()
        return {**settings_of(self.recipe), "model": model, "task": task}

    def title(self) -> str:
        return f"{self.task.name}-seed{self.recipe.seed}"

    def run(self, folder: Path, store: Store) -> Result:
        recipe = self.recipe.replace(out=str(folder), overwrite=True)
        run = federate(base_net(recipe.model), self.task, recipe, resume=True)
        told = {key: run.result[key] for key in ("test_score", "val_score", "best_round")}
        sent = {"megabytes_up": run.result["bytes_up_total"] / 1e6, "seed": recipe.seed}
        return {"points": [told | sent], "rows": run.rows}


def suite_cells(name: str, recipe: SuiteRecipe, inputs: Inputs) -> list[Cell]:
    """One cell for each row of a suite and seed.

    Raises:
        DeltaflError: every mistake of a row, and what its run could only say when its turn comes.
    """
    if not recipe.data.data:
        raise DeltaflError("data is missing; name it with --data")
    known = FederatedRecipe.model_fields
    base = FederatedRecipe(**{key: value for key, value in recipe if key in known})
    if base.local.client is not None:
        find_callable(base.local.client, "client")
    if name != "aggregators":  # which goes through all rules: there the row says so
        base.check_rule()
    cells, problems = list[Cell](), dict[str, str]()
    for (labels, own), seed in product(SUITES[name](recipe), recipe.seeds):
        work = FederatedWork(base.replace(**own, seed=seed), inputs)
        cells.append(Cell(labels, work))
        try:
            make_shards(work.task, work.recipe)
        except DeltaflError as error:
            for line in error.problems:
                problems.setdefault(line, f"{name}, {cells[-1].name}: {line}")
    if problems:
        raise DeltaflError(*problems.values())
    return cells


def suite_rows(found: Found) -> Result:
    """For each row test scores over seeds, bytes, the mean curves. What failed has no numbers."""
    labels, means = [*found[0][0].labels], ("val_score", "best_round", "megabytes_up")
    points = points_of(found).reindex(columns=[*labels, "test_score", *means])

    def curves(key: str, scale: float) -> Mapping[str, object]:
        """Validation score, against a number of the rows."""
        return mean_curves(
            (
                cell.name,
                [
                    (r.get(key, 0) * scale, r["val_score"])
                    for r in one["rows"]
                    if r["val_score"] is not None
                ],
            )
            for cell, one in found
            if "rows" in one
        )

    return {
        "labels": labels,
        "rows": tabulate(points, labels, "test_score", *means),
        "by_round": curves("round", 1),
        "by_bytes": curves("bytes_up_total", 1e-6),
    }
