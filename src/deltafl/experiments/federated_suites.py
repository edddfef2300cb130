"""The suites of "Federated Learning Under the Lens of Task Arithmetic": which runs each one compares."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from deltafl.errors import DeltaflError
from deltafl.federated.recipe import FederatedRecipe
from deltafl.rules.rule import load_rules
from deltafl.sparse.masks import MASK_STRATEGIES


@dataclass(frozen=True)
class Cell:
    """One row of a suite's table: what sets it apart (column -> value) and the recipe, its seed aside."""

    labels: Mapping[str, str | float | int]
    recipe: FederatedRecipe

    @property
    def name(self) -> str:
        """The labels in one line, numbers with what they are of."""
        return ", ".join(
            v if isinstance(v, str) else f"{key} = {v}" for key, v in self.labels.items()
        )


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


def _iid(base: FederatedRecipe) -> FederatedRecipe:
    return replace(base, sharding="iid", nc=None, alpha=None)


def _classes(base: FederatedRecipe, nc: int) -> FederatedRecipe:
    return replace(base, sharding="non_iid", nc=nc, alpha=None)


def heterogeneity(base: FederatedRecipe, options: SuiteOptions) -> list[Cell]:
    """FedAvg as clients hold fewer classes."""
    cells = [Cell({"sharding": f"Nc = {nc}"}, _classes(base, nc)) for nc in options.nc_values]
    return [Cell({"sharding": "IID"}, _iid(base)), *cells]


def local_steps(base: FederatedRecipe, options: SuiteOptions) -> list[Cell]:
    """More local steps and fewer rounds, the product being the same."""
    work = base.num_rounds * options.j_values[0]
    cells = []
    for label, recipe in (("IID", _iid(base)), (f"Nc = {options.nc}", _classes(base, options.nc))):
        for j in options.j_values:
            rounds = max(1, work // j)
            labels = {"sharding": label, "J": j, "rounds": rounds}
            cells.append(Cell(labels, replace(recipe, local_steps=j, num_rounds=rounds)))
    return cells


def sparsity(base: FederatedRecipe, options: SuiteOptions) -> list[Cell]:
    """Dense training and masks of growing sparsity."""
    recipe = _classes(base, options.nc)
    cells = [
        Cell({"sparsity": ratio}, replace(recipe, sparsity_ratio=ratio))
        for ratio in sorted(options.sparsity_ratios)
    ]
    return [Cell({"sparsity": 0.0}, replace(recipe, sparsity_ratio=0.0)), *cells]


def calibration_rounds(base: FederatedRecipe, options: SuiteOptions) -> list[Cell]:
    """Masks from one and from several rounds of scoring."""
    recipe = replace(_classes(base, options.nc), sparsity_ratio=options.sparsity)
    return [
        Cell({"calibration": kind, "R": R}, replace(recipe, calibration=kind, calibration_rounds=R))
        for kind in ("average", "progressive")
        for R in options.calibration_values
    ]


def mask_strategies(base: FederatedRecipe, options: SuiteOptions) -> list[Cell]:
    """Which coordinates to train, at one sparsity, against training all."""
    recipe = _classes(base, options.nc)
    cells = [
        Cell(
            {"strategy": name}, replace(recipe, sparsity_ratio=options.sparsity, mask_strategy=name)
        )
        for name in MASK_STRATEGIES
    ]
    return [Cell({"strategy": "dense"}, replace(recipe, sparsity_ratio=0.0)), *cells]


def aggregators(base: FederatedRecipe, options: SuiteOptions) -> list[Cell]:
    """Every rule as the server with its typical parameters, IID and not, local steps equal and not."""
    rules = load_rules()
    return [
        Cell(
            {"rule": rule, "sharding": label, "local steps": steps},
            replace(
                recipe,
                aggregator=rule,
                aggregator_params=rules[rule].typical(),
                local_steps_spread=spread,
            ),
        )
        for label, recipe in (
            ("IID", _iid(base)),
            (f"Nc = {options.nc}", _classes(base, options.nc)),
        )
        for steps, spread in (("equal", 1.0), ("unequal", options.steps_spread))
        for rule in rules
    ]


SUITES: Mapping[str, Callable[[FederatedRecipe, SuiteOptions], Sequence[Cell]]] = {
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
    cells = {name: list(SUITES[name](base, options)) for name in names}
    problems = [
        f"{name}, {cell.name}: {problem}"
        for name in names
        for cell in cells[name]
        for problem in cell.recipe.problems()
        or ([] if name == "aggregators" else _refusals(cell.recipe))
    ]
    if problems:
        raise DeltaflError(*dict.fromkeys(problems))
    return cells


def _refusals(recipe: FederatedRecipe) -> Sequence[str]:
    try:
        recipe.check_clients()
    except DeltaflError as error:
        return error.problems
    return ()
