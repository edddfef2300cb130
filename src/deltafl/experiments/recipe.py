"""The recipe of `deltafl suite`: the base run, the values that suites go through, and the studies."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from deltafl.errors import DeltaflError, did_you_mean
from deltafl.federated import FederatedRecipe
from deltafl.recipe_file import load_yaml
from deltafl.recipes import Flags, Incidental, Recipe, leaves, one_of, read_recipe
from deltafl.rules.rule import load_rules
from deltafl.sparse.recipe import SparseRecipe
from deltafl.training import TrainingRecipe

Limit = Annotated[int | None, Field(ge=1)]

QUICK: Mapping[str, Any] = {
    "num_clients": 20,
    "participation_rate": 0.25,
    "num_rounds": 6,
    "batch_size": 32,
    "lr": 0.002,
    "eval_every": 2,
    "j_values": (4, 8, 12),
    "draws": 2,
    "methods": ("task_arithmetic", "fednova", "fedgma", "median", "cclip", "ties"),
    "scaling_coefs": (0.2, 0.4, 0.6, 0.8, 1.0),
    "val_limit": 200,
    "test_limit": 1000,
}
"""Of --quick, under what is given: minutes on two cores."""

FULL: Mapping[str, Any] = {
    "num_clients": 100,
    "participation_rate": 0.1,
    "num_rounds": 500,
    "eval_every": 10,
}
"""Of --full, under what is given: the setting of the course work, hours on a GPU."""

BUNDLED: Mapping[str, Any] = {
    "data": "digits:mirrored",
    "nc_values": (2, 5),
    "calibration_values": (1, 2, 4),
    "tasks": ("digits:textured", "digits:thick", "digits:mirrored", "digits:outlined"),
    "lr_values": (3e-4, 1e-4),
    "steps_values": (40, 120),
    "control": "digits",
    "domains": ("digits:mirrored", "digits:thick"),
    "split": "digits:thick",
}
"""Without --model, --data and --tasks: digits, on which a small pre-trained ViT is poor at first."""


class QuickstartRecipe(Recipe):
    """The whole story on bundled data."""

    seed: int = Field(0, description="same seed, same numbers")
    out: Annotated[str, Incidental] = Field("quickstart", description="the folder to write")
    overwrite: Annotated[bool, Incidental] = Field(False, description="replace an existing output")


class ValuesRecipe(Recipe):
    """The values that suites of federated runs go through."""

    nc_values: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        (1, 5, 10, 50),
        min_length=1,
        description="classes per client: heterogeneity; the others take the second value",
    )
    j_values: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        (4, 8, 16), min_length=1, description="local steps: local-steps"
    )
    sparsity_ratios: Annotated[
        tuple[Annotated[float, Field(gt=0, lt=1)], ...],
        Flags(("--sparsity-ratios", "--sparsity-ratio")),
    ] = Field(
        (0.5, 0.8, 0.9, 0.95),
        min_length=1,
        description="shares of frozen coordinates: sparsity; the others take the middle one",
    )
    calibration_values: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        (1, 3, 5), min_length=1, description="rounds of scoring: calibration-rounds"
    )
    steps_spread: Annotated[float, Flags()] = Field(
        4.0, ge=1, description="of unequal local steps: aggregators"
    )

    @property
    def nc(self) -> int:
        """The heterogeneity of suites that need one: the second of several values, or the only one."""
        return self.nc_values[min(1, len(self.nc_values) - 1)]

    @property
    def sparsity(self) -> float:
        """The sparsity of suites that need one: the middle value."""
        return self.sparsity_ratios[len(self.sparsity_ratios) // 2]


class StudyRecipe(Recipe):
    """Studies of merges of fine-tunes, with the defaults of arXiv 2411.18607."""

    tasks: tuple[str, ...] = Field((), description="data sets, each as --data takes one")
    lr_values: tuple[Annotated[float, Field(gt=0)], ...] = Field(
        (1e-4, 1e-5, 1e-6),
        min_length=1,
        description="learning rates; studies of one training use the second",
    )
    steps_values: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        (1000, 2000, 3000, 4000),
        min_length=1,
        description="numbers of steps; studies of one training use the largest",
    )
    draws: int = Field(4, ge=1, description="merges of one kind and seed in training-heterogeneity")
    methods: tuple[Annotated[str, one_of(load_rules)], ...] = Field(
        (), description="the rules that are compared (default: every rule)"
    )
    scaling_coefs: tuple[float, ...] = Field(
        tuple(round(0.05 * i, 2) for i in range(1, 41)), min_length=1, description="lambda"
    )
    search_strategy: Literal["racing", "exhaustive"] = Field(
        "racing", description="of lambda and rho; races are within each method"
    )
    val_limit: Limit = Field(
        None, description="at most so many validation examples of each task judge a merge"
    )
    test_limit: Limit = Field(None, description="at most so many test examples of each task")
    control: str | None = Field(
        None, description="the task that negation must not harm (default: the last of the tasks)"
    )
    domains: tuple[str, ...] = Field(
        (), description="two data sets with the same classes, for the analogy"
    )
    split: str | None = Field(
        None,
        description="the data set whose classes are dealt to several models (default: the last)",
    )
    jobs: Annotated[int | None, Incidental] = Field(
        None, ge=1, description="pieces of work at a time (default: one for each core; 1 on a GPU)"
    )

    def problems(self) -> Iterator[str]:
        if len(set(self.tasks)) < len(self.tasks):
            yield "tasks names a data set twice"

    def lacking(self, name: str) -> str | None:
        """What a study needs that these settings do not say; None: nothing."""
        if len(self.tasks) < 2:
            return "at least two data sets with --tasks"
        if name == "training-heterogeneity":
            several = min(len(set(self.lr_values)), len(set(self.steps_values))) > 1
            return None if several else "at least two of --lr-values and two of --steps-values"
        if name == "analogy" and (len(self.domains) != 2 or len(set(self.domains)) != 2):
            return "--domains: two data sets with the same classes"
        return None

    def grids(self) -> tuple[tuple[str, Mapping[str, Any]], ...]:
        """(method, parameters) of the methods that are compared; task arithmetic, which gains refer
        to, goes first.
        """
        rules = load_rules()
        named = dict.fromkeys(("task_arithmetic", *(self.methods or rules)))
        return tuple((name, rules[name].values) for name in named)


class SuiteSparseRecipe(SparseRecipe):
    """Masks, whose sparsity the suites choose."""

    sparsity_ratio: Annotated[float, Flags()] = Field(
        0.0, ge=0, lt=1, description="chosen by each suite, see sparsity_ratios"
    )


class SuiteRecipe(FederatedRecipe):
    """Federated runs compared, and merges of fine-tunes; every run with several seeds."""

    sparse: SuiteSparseRecipe = SuiteSparseRecipe.of()
    quick: Annotated[bool, Incidental] = Field(
        False, description="small settings: minutes on two cores"
    )
    full: Annotated[bool, Incidental] = Field(
        False, description="the settings of the course work: hours on a GPU"
    )
    num_runs: Annotated[int, Incidental] = Field(1, ge=1, description="seeds of every row")
    tensorboard: Annotated[bool, Incidental] = Field(
        False, description="write OUT/metrics for TensorBoard too, a folder for each run"
    )
    values: ValuesRecipe = ValuesRecipe.of()
    study: StudyRecipe = StudyRecipe.of()

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        if self.quick and self.full:
            yield "--quick and --full are two sizes; give one of them"

    @property
    def bundled(self) -> bool:
        """Whether the model is the small ViT that the suite pre-trains itself."""
        return not self.model


def read_suite(
    path: str | Path | None, settings: Mapping[str, Any]
) -> tuple[SuiteRecipe, TrainingRecipe]:
    """The recipe of a suite, and how its fine-tunes are trained: by those of the given settings that
    fine-tunes have too. Without model, data and tasks it is about the bundled ones.

    Raises:
        DeltaflError: every mistake.
    """
    given = dict(_leaf_values(load_yaml(path) if path else {})) | dict(settings)
    bundled = not {"model", "data", "tasks"} & given.keys()
    size = QUICK if given.get("quick") else FULL if given.get("full") else {}
    defaults = {"data": "", "out": "deltafl-suite"} | dict(size)
    defaults |= {"model": "", **BUNDLED} if bundled else {}
    recipe = read_recipe(SuiteRecipe, path, settings, defaults=defaults)
    other = {"model", "data", "out", "lr", "lr_schedule", "momentum", "eval_every", "patience"}
    small = {"batch_size": 32, "steps": 0} if bundled else {"steps": 0}
    chosen = {name: given[name] for name in (given.keys() & leaves(TrainingRecipe).keys()) - other}
    training = TrainingRecipe.of(model=recipe.model, data="", **small | chosen)
    return recipe, training


def _leaf_values(data: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in data.items():
        if isinstance(value, Mapping):
            yield from _leaf_values(value)
        else:
            yield key, value


def suite_names(asked: Iterable[str], known: Iterable[str]) -> list[str]:
    """The suites asked for, each once; "all" is every one.

    Raises:
        DeltaflError: no name, or an unknown one.
    """
    asked, known = list(asked), list(known)
    if not asked:
        raise DeltaflError(f"name a suite: {', '.join(known)}, or all")
    if unknown := [name for name in asked if name not in (*known, "all")]:
        raise DeltaflError(
            *(f'no suite "{name}"; {did_you_mean(name, (*known, "all"))}' for name in unknown)
        )
    return known if "all" in asked else list(dict.fromkeys(asked))
