"""The suites of "Federated Learning Under the Lens of Task Arithmetic": which runs each one compares."""

from collections.abc import Callable, Mapping, Sequence

from deltafl.experiments.recipe import ValuesRecipe
from deltafl.federated import FederatedRecipe
from deltafl.rules.rule import load_rules
from deltafl.sparse.strategies import MASK_STRATEGIES

Rows = Sequence[tuple[Mapping[str, str | float | int], FederatedRecipe]]
"""Labels and recipe of each row of a suite's table; every row is run with several seeds."""


def heterogeneity(base: FederatedRecipe, values: ValuesRecipe) -> Rows:
    """FedAvg as clients hold fewer classes."""
    classes = [({"sharding": f"Nc = {nc}"}, _classes(base, nc)) for nc in values.nc_values]
    return [({"sharding": "IID"}, _iid(base)), *classes]


def local_steps(base: FederatedRecipe, values: ValuesRecipe) -> Rows:
    """More local steps and fewer rounds, the product being the same."""
    work = base.num_rounds * values.j_values[0]
    return [
        (
            {"sharding": label, "J": j, "rounds": (rounds := max(1, work // j))},
            recipe.replace(local_steps=j, num_rounds=rounds),
        )
        for label, recipe in _iid_and_not(base, values)
        for j in values.j_values
    ]


def sparsity(base: FederatedRecipe, values: ValuesRecipe) -> Rows:
    """Dense training and masks of growing sparsity."""
    recipe = _classes(base, values.nc)
    ratios = (0.0, *sorted(values.sparsity_ratios))
    return [({"sparsity": ratio}, recipe.replace(sparsity_ratio=ratio)) for ratio in ratios]


def calibration_rounds(base: FederatedRecipe, values: ValuesRecipe) -> Rows:
    """Masks from one and from several rounds of scoring."""
    recipe = _classes(base, values.nc).replace(sparsity_ratio=values.sparsity)
    return [
        (
            {"calibration": kind, "R": rounds},
            recipe.replace(calibration=kind, calibration_rounds=rounds),
        )
        for kind in ("average", "progressive")
        for rounds in values.calibration_values
    ]


def mask_strategies(base: FederatedRecipe, values: ValuesRecipe) -> Rows:
    """Which coordinates to train, at one sparsity, against training all."""
    recipe = _classes(base, values.nc)
    sparse = recipe.replace(sparsity_ratio=values.sparsity)
    masks = [({"strategy": s}, sparse.replace(mask_strategy=s)) for s in MASK_STRATEGIES]
    return [({"strategy": "dense"}, recipe.replace(sparsity_ratio=0.0)), *masks]


def aggregators(base: FederatedRecipe, values: ValuesRecipe) -> Rows:
    """Every rule as the server, IID and not, with equal and unequal local steps."""
    unset = dict.fromkeys(base.server.params)
    return [
        (
            {"rule": name, "sharding": label, "local steps": steps},
            recipe.replace(**unset | rule.typical(), aggregator=name, local_steps_spread=spread),
        )
        for label, recipe in _iid_and_not(base, values)
        for steps, spread in (("equal", 1.0), ("unequal", values.steps_spread))
        for name, rule in ((name, load_rules()[name]) for name in load_rules())
    ]


def _iid(base: FederatedRecipe) -> FederatedRecipe:
    return base.replace(sharding="iid", nc=None, alpha=None)


def _classes(base: FederatedRecipe, nc: int) -> FederatedRecipe:
    return base.replace(sharding="non_iid", nc=nc, alpha=None)


def _iid_and_not(
    base: FederatedRecipe, values: ValuesRecipe
) -> Sequence[tuple[str, FederatedRecipe]]:
    return (("IID", _iid(base)), (f"Nc = {values.nc}", _classes(base, values.nc)))


SUITES: Mapping[str, Callable[[FederatedRecipe, ValuesRecipe], Rows]] = {
    "heterogeneity": heterogeneity,
    "local-steps": local_steps,
    "sparsity": sparsity,
    "calibration-rounds": calibration_rounds,
    "mask-strategies": mask_strategies,
    "aggregators": aggregators,
}
