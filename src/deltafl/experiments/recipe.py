"""The recipe of `deltafl suite`: the base run, the values that suites go through, the studies."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from deltafl.errors import DeltaflError, did_you_mean
from deltafl.federated import FederatedRecipe
from deltafl.recipe_file import load_yaml
from deltafl.recipes import Flags, Incidental, Recipe, leaves, one_of, read_recipe
from deltafl.rules.building import delta_rules, load_rules
from deltafl.sparse.recipe import SparseRecipe
from deltafl.tasks.recipe import Score
from deltafl.training import TrainingRecipe

Limit = Annotated[int | None, Field(ge=1)]
Counts = Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1)]

PRESETS = load_yaml(Path(__file__).with_name("presets.yaml"))
"""What lies under the given settings: of --quick, of --full, and of suites on bundled data."""


class QuickstartRecipe(Recipe):
    """The whole story on bundled data."""

    seed: int = Field(0, description="same seed, same numbers")
    out: Annotated[str, Incidental] = Field("quickstart", description="the folder to write")
    overwrite: Annotated[bool, Incidental] = Field(False, description="replace an existing output")


class ValuesRecipe(Recipe):
    """The values that suites of federated runs go through."""

    nc_values: Counts = Field(
        (1, 5, 10, 50),
        description="classes per client: heterogeneity; the others take the second value",
    )
    j_values: Counts = Field((4, 8, 16), description="local steps: local-steps")
    sparsity_ratios: Annotated[
        tuple[Annotated[float, Field(gt=0, lt=1)], ...],
        Flags(("--sparsity-ratios", "--sparsity-ratio")),
    ] = Field(
        (0.5, 0.8, 0.9, 0.95),
        min_length=1,
        description="shares of frozen coordinates: sparsity; the others take the middle one",
    )
    calibration_values: Counts = Field(
        (1, 3, 5), description="rounds of scoring: calibration-rounds"
    )
    steps_spread: Annotated[float, Flags()] = Field(
        4.0, ge=1, description="of unequal local steps: aggregators"
    )

    @property
    def nc(self) -> int:
        """The heterogeneity of suites that need one: the second of several, or the only one."""
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
    steps_values: Counts = Field(
        (1000, 2000, 3000, 4000),
        description="numbers of steps; studies of one training use the largest",
    )
    draws: int = Field(4, ge=1, description="merges of one kind and seed in training-heterogeneity")
    methods: tuple[Annotated[str, one_of(load_rules)], ...] = Field(
        (), description="the rules that are compared (default: every rule)"
    )
    examples_values: Counts = Field(
        (8, 32, 128, 512), description="unlabelled examples of each task: examples"
    )
    rival_steps: int = Field(
        150, ge=1, description="steps of the trainings that merges by examples are measured against"
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
    written: dict[str, Score] = Field(
        {},
        description="data sets on which what the models write is judged, by which score, as "
        "{gsm8k: exact}; in a file: language",
    )
    written_limit: Limit = Field(100, description="at most so many test examples of each of them")
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
        spread = min(len({*self.lr_values}), len({*self.steps_values}))
        if name == "training-heterogeneity" and spread < 2:
            return "at least two of --lr-values and two of --steps-values"
        if name == "language" and not self.written:
            return "study.written in a file: on which data what a model writes is judged, and how"
        if name == "analogy" and not len(self.domains) == len({*self.domains}) == 2:
            return "--domains: two data sets with the same classes"
        return None

    @property
    def compared(self) -> tuple[str, ...]:
        """The rules that are compared; task arithmetic, which gains refer to, goes first."""
        return tuple(dict.fromkeys(("task_arithmetic", *(self.methods or delta_rules()))))

    @property
    def kept(self) -> str:
        """The control task."""
        return self.control or self.tasks[-1]

    @property
    def dealt(self) -> str:
        """The data set whose classes are dealt."""
        return self.split or self.tasks[-1]


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
    def seeds(self) -> range:
        """One for each run."""
        return range(self.seed, self.seed + self.num_runs)


def read_suite(
    path: str | Path | None, settings: Mapping[str, Any]
) -> tuple[SuiteRecipe, TrainingRecipe]:
    """The recipe of a suite, and how its fine-tunes are trained: by those of the given settings
    that fine-tunes have too. Without model, data and tasks it is about the bundled ones.

    Raises:
        DeltaflError: every mistake.
    """
    given = dict(_leaf_values(load_yaml(path) if path else {})) | dict(settings)
    bundled = not {"model", "data", "tasks"} & given.keys()
    defaults: dict[str, object] = {"data": "", "out": "deltafl-suite"}
    for name in ("quick", "full", *["bundled"] * bundled):
        if given.get(name, name == "bundled"):
            defaults |= PRESETS[name]
    recipe = read_recipe(SuiteRecipe, path, settings, defaults=defaults)
    other = {"model", "data", "out", "lr", "lr_schedule", "momentum", "eval_every", "patience"}
    chosen = {name: given[name] for name in (given.keys() & leaves(TrainingRecipe).keys()) - other}
    small = {"batch_size": 32} if bundled else {}
    return recipe, TrainingRecipe.of(model=recipe.model, data="", **{"steps": 0, **small, **chosen})


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
    asked, known = [*asked], [*known]
    every = (*known, "all")
    problems = [f'no suite "{n}"; {did_you_mean(n, every)}' for n in asked if n not in every]
    if not asked:
        problems = [f"name a suite: {', '.join(known)}, or all"]
    if problems:
        raise DeltaflError(*problems)
    return known if "all" in asked else list(dict.fromkeys(asked))
