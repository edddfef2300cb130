"""The suites of "Federated Learning Under the Lens of Task Arithmetic": which runs each one compares."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

from deltafl.errors import DeltaflError
from deltafl.federated.recipe import FederatedRecipe
from deltafl.rules.rule import load_rules
from deltafl.sparse.masks import MASK_STRATEGIES

Labels: TypeAlias = Mapping[str, str | float | int]
Changes: TypeAlias = Mapping[str, Any]
"""Leaves of the recipe -> their values."""


class Row(NamedTuple):
    """What sets a row of a suite's table apart, in words and in settings."""

    labels: Labels
    changes: Changes


@dataclass(frozen=True)
class Cell:
    """One row of a suite's table: what sets it apart (column -> value) and the recipe, its seed aside."""

    labels: Labels
    recipe: FederatedRecipe

    @property
    def name(self) -> str:
        return _name(self.labels)


def _name(labels: Labels) -> str:
    """The labels in one line, numbers with what they are of."""
    return ", ".join(v if isinstance(v, str) else f"{key} = {v}" for key, v in labels.items())


@dataclass(frozen=True)
class SuiteOptions:
    """The values that suites go through; sparsity: of the suites that compare masks."""

    nc_values: tuple[int, ...] = (1, 5, 10, 50)
    j_values: tuple[int, ...] = (4, 8, 16)
    sparsity_ratios: tuple[float, ...] = (0.5, 0.8, 0.9, 0.95)
    calibration_values: tuple[int, ...] = (1, 3, 5)
    steps_spread: float = 4.0

    @property
    def nc(self) -> int:
        """The heterogeneity of suites that need one: the second of several values, or the only one."""
        return self.nc_values[min(1, len(self.nc_values) - 1)]

    @property
    def sparsity(self) -> float:
        """The sparsity of suites that need one: the middle value."""
        return self.sparsity_ratios[len(self.sparsity_ratios) // 2]


IID: Changes = {"sharding": "iid", "nc": None, "alpha": None, "allow_missing_classes": False}


def _classes(nc: int) -> Changes:
    return {"sharding": "non_iid", "nc": nc, "alpha": None}


def heterogeneity(base: FederatedRecipe, options: SuiteOptions) -> list[Row]:
    """FedAvg as clients hold fewer classes."""
    rows = [Row({"sharding": f"Nc = {nc}"}, _classes(nc)) for nc in options.nc_values]
    return [Row({"sharding": "IID"}, IID), *rows]


def local_steps(base: FederatedRecipe, options: SuiteOptions) -> list[Row]:
    """More local steps and fewer rounds, the product being the same."""
    work = base.num_rounds * options.j_values[0]
    rows = []
    for label, sharding in (("IID", IID), (f"Nc = {options.nc}", _classes(options.nc))):
        for j in options.j_values:
            rounds = max(1, work // j)
            labels = {"sharding": label, "J": j, "rounds": rounds}
            rows.append(Row(labels, {**sharding, "local_steps": j, "num_rounds": rounds}))
    return rows


def sparsity(base: FederatedRecipe, options: SuiteOptions) -> list[Row]:
    """Dense training and masks of growing sparsity."""
    sharding = _classes(options.nc)
    ratios = (0.0, *sorted(options.sparsity_ratios))
    return [Row({"sparsity": ratio}, {**sharding, "sparsity_ratio": ratio}) for ratio in ratios]


def calibration_rounds(base: FederatedRecipe, options: SuiteOptions) -> list[Row]:
    """Masks from one and from several rounds of scoring."""
    shared = {**_classes(options.nc), "sparsity_ratio": options.sparsity}
    return [
        Row(
            {"calibration": kind, "R": R},
            {**shared, "calibration": kind, "calibration_rounds": R},
        )
        for kind in ("average", "progressive")
        for R in options.calibration_values
    ]


def mask_strategies(base: FederatedRecipe, options: SuiteOptions) -> list[Row]:
    """Which coordinates to train, at one sparsity, against training all."""
    sharding, ratio = _classes(options.nc), options.sparsity
    rows = [
        Row({"strategy": name}, {**sharding, "sparsity_ratio": ratio, "mask_strategy": name})
        for name in MASK_STRATEGIES
    ]
    return [Row({"strategy": "dense"}, {**sharding, "sparsity_ratio": 0.0}), *rows]


def aggregators(base: FederatedRecipe, options: SuiteOptions) -> list[Row]:
    """Every rule as the server with its typical parameters, IID and not, local steps equal and not."""
    rules = load_rules()
    none = dict.fromkeys(base.server.params)
    return [
        Row(
            {"rule": rule, "sharding": label, "local steps": steps},
            {
                **none,
                **sharding,
                "aggregator": rule,
                "local_steps_spread": spread,
                **rules[rule].typical(),
            },
        )
        for label, sharding in (("IID", IID), (f"Nc = {options.nc}", _classes(options.nc)))
        for steps, spread in (("equal", 1.0), ("unequal", options.steps_spread))
        for rule in rules
    ]


SUITES: Mapping[str, Callable[[FederatedRecipe, SuiteOptions], Sequence[Row]]] = {
    "heterogeneity": heterogeneity,
    "local-steps": local_steps,
    "sparsity": sparsity,
    "calibration-rounds": calibration_rounds,
    "mask-strategies": mask_strategies,
    "aggregators": aggregators,
}


def check_suites(
    names: Sequence[str], base: FederatedRecipe, options: SuiteOptions
) -> dict[str, list[Cell]]:
    """The cells of each suite.

    Raises:
        DeltaflError: every mistake of every recipe, before anything runs. That a rule which the suite itself chooses
            needs more clients (krum) is none: its row says so.
    """
    cells: dict[str, list[Cell]] = {name: [] for name in names}
    problems = []
    for name in names:
        for labels, changes in SUITES[name](base, options):
            try:
                recipe = base.replace(**changes)
                if name != "aggregators":
                    recipe.check_rule()
                cells[name].append(Cell(labels, recipe))
            except DeltaflError as error:
                problems += [f"{name}, {_name(labels)}: {line}" for line in error.problems]
    if problems:
        raise DeltaflError(*dict.fromkeys(problems))
    return cells
