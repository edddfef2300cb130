"""The recipe of `deltafl merge`, and what it shares with that of `deltafl search`."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, ClassVar, Literal, TypeAlias

from pydantic import ByteSize, Field

from deltafl.checkpoints.layout import CODES
from deltafl.errors import attempt
from deltafl.recipes import Flags, Incidental, Recipe
from deltafl.rules.parameters import RuleParameters
from deltafl.rules.weights import Weights, as_weights

Dtype: TypeAlias = Literal["float32", "float16", "bfloat16", "float64"]

LISTS = {"weights": "weight", "num_steps": "num_steps", "num_examples": "num_examples"}
LISTS |= {"tasks": "data"}
"""What is said of all models in one list -> what says it of one."""


MODELS = "The fine-tuned models: folders, files or hub ids; in a file also mappings."

PASSTHROUGH = "passthrough"
"""The method of a merge without models: of a base made of layers of several."""

KINDS = {"regmean": "gram", "fisher": "fisher"}
"""Method -> the statistics that it takes in place of examples."""


class ModelEntry(Recipe):
    """A fine-tuned model; None: as training.json beside it says, and a weight of 1."""

    path: str = Field(min_length=1, description="Folder, file or hub id.")
    name: str | None = Field(None, description="Default: the last part of the path.")
    weight: float | None = Field(None, description="Of its delta. Negative: the delta is negated.")
    num_steps: int | None = Field(None, description="Local steps of its training.")
    num_examples: int | None = Field(None, description="Examples that it was trained on.")
    data: str | None = Field(None, description="Its task, for methods that need examples.")


class TokenRecipe(Recipe):
    """The row of a token in models that lack it."""

    model: str | None = Field(None, description="Whose row, by name or path. Default: zeros.")
    token: str | None = Field(None, description="Which of its tokens. Default: the same.")
    token_id: int | None = Field(None, ge=0, description="Or the number of its row.")
    force: bool = Field(False, description="Also in models that have the token.")

    def problems(self) -> Iterator[str]:
        """A row that is named twice, or of no model."""
        if [self.model, self.token, self.token_id].count(None) < (1 if self.model else 3):
            yield "give a model, with at most one of token and token_id"


class DeltaRecipe(Recipe):
    """Which deltas there are, of which tensors, and where they are computed."""

    base: str = Field(
        description="The model that all were fine-tuned from: folder, file or hub id."
    )
    models: tuple[str | ModelEntry, ...] = Field(min_length=1, description=MODELS)
    weights: tuple[float, ...] | None = Field(
        None,
        description="One weight for each model. Default: equal. Negative: the delta is negated.",
    )
    num_steps: tuple[int, ...] | None = Field(
        None, description="Local steps of each model. Default: as its training.json says."
    )
    num_examples: tuple[int, ...] | None = Field(
        None, description="Examples of each model. Default: as its training.json says."
    )
    scope: str = Field(
        "", description="Only tensors of the base under this prefix, as vision_model."
    )
    include: tuple[str, ...] = Field(
        (), description="Only tensors of the base that match one of these patterns."
    )
    exclude: tuple[str, ...] = Field(
        (), description="Copy tensors that match one of these patterns from the base."
    )
    allow_other_base: bool = Field(
        False, description="Accept fine-tunes whose training.json names another base."
    )
    device: Annotated[str, Incidental] = Field("cpu", description="Where to compute: cpu or cuda.")
    threads: Annotated[int, Incidental] = Field(
        0, ge=0, description="0: one for each core, at most 8."
    )
    out: Annotated[str | None, Incidental] = Field(None, description="The folder to write.")
    overwrite: Annotated[bool, Incidental] = Field(False, description="Replace an existing output.")

    @property
    def entries(self) -> dict[str, ModelEntry]:
        """Name -> model, with all that is said of it. A name is the last part of the path, where
        two share it the path, and at worst a number.
        """
        plain = [m if isinstance(m, ModelEntry) else ModelEntry.of(path=m) for m in self.models]
        paths = [Path(entry.path) for entry in plain]
        last = [path.name or path.absolute().name for path in paths]  # of "." too
        found: dict[str, ModelEntry] = {}
        for i, entry in enumerate(plain):
            short = last[i] if last.count(last[i]) == 1 else ""
            name = wish = entry.name or short or entry.path
            number = 1
            while name in found:
                number += 1
                name = f"{wish}#{number}"
            listed = {LISTS[key]: numbers[i] for key, numbers in self._listed().items()}
            found[name] = entry.model_copy(update=listed)
        return found

    def _listed(self) -> dict[str, tuple[float, ...]]:
        return {key: value for key, value in self if key in LISTS and value is not None}

    def problems(self) -> Iterator[str]:
        """Numbers that are not one for each model, or are given twice."""
        n = len(self.models)
        for key, numbers in self._listed().items():
            if len(numbers) != n:
                yield f"{key}: {len(numbers)} given for {n} models"
        beside = any(isinstance(m, ModelEntry) and m.weight is not None for m in self.models)
        if self.weights is not None and beside:
            yield "weights: given both as a list and beside the models; give one of them"


class PushedRecipe(Recipe):
    """Where the merged folder is uploaded to."""

    push: Annotated[str | None, Incidental] = Field(
        None,
        pattern=r"^[\w.-]+/[\w.-]+$",
        description="Upload the merged folder to this model repository of the hub (OWNER/NAME).",
    )


class MergeRecipe(RuleParameters, DeltaRecipe, PushedRecipe):
    """One server step over fine-tuned models: base + server_lr times the rule's mean update."""

    alternatives: ClassVar = (("server_lr", "scaling_coef", "scale_patterns"),)

    models: tuple[str | ModelEntry, ...] = Field((), description=MODELS)
    method: str = Field(
        "task_arithmetic",
        description="The rule (see `deltafl rules`); passthrough: the base alone, as it is.",
    )
    server_lr: float | None = Field(
        None, description="The scale of the mean of deltas. Default: 1, the mean itself."
    )
    scaling_coef: float | None = Field(
        None, description="The scale of the sum of deltas (lambda), instead of --server-lr."
    )
    tasks: Annotated[tuple[str, ...] | None, Flags(("--tasks", "--task"))] = Field(
        None,
        description="The task of each model, as --data takes one, for methods that need examples.",
    )
    data_dir: Annotated[str | None, Incidental] = Field(
        None, description="The folder that holds tasks by name. Default: they come from the hub."
    )
    weight_patterns: dict[str, list[float]] = Field(
        {},
        description="Glob on the base's tensor names: one weight for each model; the first match.",
    )
    scale_patterns: dict[str, float] = Field(
        {},
        description="Glob on the base's tensor names: their scale, before the general one.",
    )
    base_patterns: dict[str, float] = Field(
        {},
        description="Glob on the base's tensor names: what multiplies the base's own tensor.",
    )
    dtype: Dtype | None = Field(None, description="Of the output. Default: the base's.")
    exact: bool = Field(False, description="Compute in float64, round once.")
    as_adapter: int | None = Field(
        None,
        ge=1,
        description="Write the update as a LoRA of at most this rank for the base, not as a model.",
    )
    energy: float | None = Field(
        None,
        gt=0,
        le=1,
        description="Write it as a LoRA, each matrix of the least rank that keeps this share of "
        "its squared norm; 1, of a weighted sum of adapters: their factors side by side, exactly.",
    )
    tokenizer_from: str | None = Field(
        None,
        description="The model, by name or path, whose tokenizer, chat template and generation "
        "config are written. Default: the base's.",
    )
    vocabulary: str | None = Field(
        None,
        description="Whose tokens the output has: union, base, or a model by name or path; rows of "
        "all models are found by token. Default: by their number, which must be the base's.",
    )
    tokens: dict[str, TokenRecipe] = Field(
        {}, description="Token -> its row; with a vocabulary, to which it is added."
    )
    pad_to_multiple_of: int | None = Field(
        None, ge=1, description="Make the rows of a vocabulary a multiple of this."
    )
    chat_template: str | None = Field(
        None,
        description="Written in place of the tokenizer's: auto (the models' most frequent one), "
        "alpaca, chatml, exaone, llama3, mistral, or Jinja text.",
    )
    max_shard_size: ByteSize = Field(
        "5GB",
        validate_default=True,
        gt=0,
        description="Split the weights into files of at most this size.",
    )
    hash: Annotated[bool, Incidental] = Field(
        False, description="Record the sha256 of every input file."
    )

    @property
    def adapter(self) -> bool:
        """Whether the output is an adapter and no model."""
        return self.as_adapter is not None or self.energy is not None

    @property
    def stored_dtype(self) -> str | None:
        """The output's dtype in safetensors' spelling; None: the base's."""
        return CODES[self.dtype] if self.dtype else None

    @property
    def scale(self) -> float:
        """server_lr, by default 1, or where it is given scaling_coef."""
        given = self.server_lr if self.scaling_coef is None else self.scaling_coef
        return 1.0 if given is None else given

    @property
    def model_weights(self) -> Weights:
        """The weights of the models. Raises DeltaflError if they are not one for each, or all 0."""
        given = [entry.weight for entry in self.entries.values()] or [None]
        rows: dict[str, Sequence[float]] = dict(self.weight_patterns)
        rows.setdefault("*", [1.0 if weight is None else weight for weight in given])
        return as_weights(rows, len(given))

    def problems(self) -> Iterator[str]:
        """What is given twice, or does not fit the models."""
        if self.server_lr is not None and self.scaling_coef is not None:
            yield "server_lr and scaling_coef are two ways to say one thing; give one of them"
        if bool(self.models) == (self.method == PASSTHROUGH):
            yield "models: name one with --models; with passthrough, which writes the base, none"
        if self.adapter and not self.models:
            yield "as_adapter: there is no update to write with passthrough"
        if self.vocabulary and self.tokenizer_from:
            yield "vocabulary says whose tokenizer is written; leave out tokenizer_from"
        if not self.vocabulary and (self.tokens or self.pad_to_multiple_of):
            yield "tokens and pad_to_multiple_of need a vocabulary: union, base or a model"
        if self.vocabulary and self.adapter:
            yield "as_adapter: an adapter has the vocabulary of its base; leave out vocabulary"
        found = list(super().problems())
        if not found:
            attempt(found, lambda: self.model_weights)
        yield from found


class ExtractRecipe(PushedRecipe):
    """A fine-tune's delta as a LoRA: the merge of one model, written as an adapter."""

    base: str = Field(description="The model that it was fine-tuned from: folder, file or hub id.")
    model: str = Field(description="The fine-tuned model: folder, file or hub id.")
    rank: int | None = Field(None, ge=1, description="Of every matrix, at most.")
    energy: float | None = Field(
        None, gt=0, le=1, description="The share of a matrix's squared norm that its rank keeps."
    )
    exclude: tuple[str, ...] = Field((), description="Leave out tensors that match a pattern.")
    dtype: Dtype | None = Field(None, description="Of the factors. Default: float32.")
    out: Annotated[str | None, Incidental] = Field(None, description="The folder to write.")
    overwrite: Annotated[bool, Incidental] = Field(False, description="Replace an existing output.")

    def problems(self) -> Iterator[str]:
        """No rank."""
        if self.rank is None and self.energy is None:
            yield "name a rank with --rank, or how much is to be kept with --energy"

    def merge(self) -> MergeRecipe:
        """The same as a merge."""
        told = dict(self)
        model, rank = told.pop("model"), told.pop("rank")
        return MergeRecipe.of(models=(model,), as_adapter=rank, **told)


class StatisticsRecipe(Recipe):
    """What a merge by regmean (gram) or fisher needs to know of a model's task."""

    model: str = Field(description="The fine-tuned model: folder, file or hub id.")
    task: str = Field(description="Its task, as --data takes one.")
    kind: Literal["gram", "fisher"] = Field(description="gram, for regmean, or fisher.")
    examples: int = Field(128, ge=1, description="Of the train split, without their labels.")
    seed: int = Field(0, description="Draws the examples.")
    device: Annotated[str, Incidental] = Field("cpu", description="Where to compute: cpu or cuda.")
    out: Annotated[str | None, Incidental] = Field(
        None, description="The folder to write. Default: statistics/KIND in the model's."
    )
    overwrite: Annotated[bool, Incidental] = Field(False, description="Replace an existing output.")
