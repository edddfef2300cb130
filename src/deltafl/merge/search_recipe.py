"""The recipe of `deltafl search`."""

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import ByteSize, Field

from deltafl.merge.candidates import Method
from deltafl.merge.recipe import DeltaRecipe, MergeRecipe, ModelEntry, PushedRecipe
from deltafl.recipes import Incidental
from deltafl.rules.parameters import RuleGrids, RuleParameters
from deltafl.tasks.recipe import DataSource

LAMBDAS = tuple(round(0.05 * i, 2) for i in range(1, 41))
"""The grid of arXiv 2411.18607."""

METHODS = ("task_arithmetic", "fednova", "fedgma", "median", "cclip")
"""Every rule of arXiv 2411.18607."""


class TaskModel(DataSource, ModelEntry):
    """A fine-tuned model and the task that it is judged on."""

    head: str | None = Field(
        None,
        description="A head.safetensors, or zero-shot (of a CLIP base). Default: in its folder.",
    )


class MethodEntry(RuleGrids):
    """A rule with its parameters; a list is a grid."""

    method: str = Field(description="The rule (see `deltafl rules`).")


class FixedEntry(RuleParameters):
    """A candidate that is tested as it is."""

    method: str = Field(description="The rule (see `deltafl rules`).")
    scaling_coef: float = Field(description="The scale of the sum of deltas, lambda.")


class SearchRecipe(DeltaRecipe, PushedRecipe):
    """Methods, their parameters and coefficients, chosen on validation data."""

    models: tuple[TaskModel, ...] = Field(
        min_length=1, description="The fine-tuned models, each with its task."
    )
    methods: tuple[str | MethodEntry, ...] = Field(
        METHODS,
        min_length=1,
        description="Names, or in a file {method: NAME, ...} with parameters; a list is a grid.",
    )
    scaling_coefs: tuple[float, ...] = Field(
        LAMBDAS, min_length=1, description="Values of lambda, the scale of the sum of deltas."
    )
    grid: Literal["default", "paper"] = Field(
        "default",
        description="Convention of the values; paper: as server_lr for rules whose paper averages.",
    )
    metric: Literal["normalized", "absolute"] = Field(
        "normalized",
        description="Mean over tasks of scores, divided by that of the task's own model or not; "
        "what is no ratio (log-likelihood) is normalised as the share of that model's gain over "
        "the base.",
    )
    strategy: Literal["exhaustive", "racing"] = Field(
        "exhaustive", description="Evaluate all, or race: drop early what cannot win."
    )
    confidence: float = Field(
        0.95, gt=0, lt=1, description="Probability with which a race keeps the best candidate."
    )
    each_method: bool = Field(
        False, description="Race within each method, so that the best of each is exact."
    )
    memory: Annotated[ByteSize, Incidental] = Field(
        "8GB",
        validate_default=True,
        description="Hold the checkpoints in memory if they fit into this, and updates of rules as "
        "far as they do; what does not is read and computed again.",
    )
    batch_size: Annotated[int, Incidental] = Field(
        256, ge=1, description="Examples in one step of an evaluation."
    )
    seed: int | None = Field(
        None,
        description="Of the validation splits. Default: the one that each model was trained with.",
    )
    data_dir: Annotated[str | None, Incidental] = Field(
        None, description="The folder that holds tasks by name. Default: they come from the hub."
    )
    templates: str | None = Field(
        None, description="Prompts for zero-shot heads: a file, one on each line, {} for the class."
    )
    fixed: dict[str, FixedEntry] = Field(
        {}, description="Row of the table: a candidate that is tested as it is, not searched."
    )
    also: tuple[DataSource, ...] = Field(
        (),
        description="Tasks that rows of the table are tested on too; nothing is chosen by them.",
    )
    reference: dict[str, Annotated[float, Field(ge=0, le=100)]] = Field(
        {}, description="Row of the table: published mean test score in percent, shown beside ours."
    )

    def problems(self) -> Iterator[str]:
        """What does not fit the models, or is named twice."""
        yield from super().problems()
        names = [method for method, _ in self.grids]
        for name in sorted({name for name in names if names.count(name) > 1}):
            yield f"methods: {name} is named twice; give one entry, whose parameters are lists"
        if self.templates is not None and not any(m.head == "zero-shot" for m in self.models):
            yield "templates: are about the zero-shot head; give models that have head: zero-shot"

    @property
    def grids(self) -> list[Method]:
        """(method, parameters) of what is searched; a list among the parameters is a grid."""
        plain = [MethodEntry.of(method=m) if isinstance(m, str) else m for m in self.methods]
        return [(entry.method, entry.params) for entry in plain]

    def merge(self, **settings: object) -> MergeRecipe:
        """The merge of these models, by default by task arithmetic."""
        shared = {name: value for name, value in self if name in DeltaRecipe.model_fields}
        models = [m.model_dump(include={*ModelEntry.model_fields}) for m in self.models]
        return MergeRecipe.of(**shared | {"models": models} | settings)
