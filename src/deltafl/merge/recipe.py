"""The recipe of `deltafl merge`, and what it shares with that of `deltafl search`."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from deltafl.checkpoints.layout import CODES
from deltafl.errors import DeltaflError
from deltafl.recipes import Incidental, Recipe
from deltafl.rules.parameters import RuleParameters
from deltafl.rules.weights import Weights, as_weights
from deltafl.sizes import Size


class ModelEntry(Recipe):
    """A fine-tuned model; None: as training.json beside it says, and a weight of 1."""

    path: str = Field(description="Folder, file or hub id.")
    name: str | None = Field(None, description="Default: the last part of the path.")
    weight: float | None = Field(None, description="Of its delta. Negative: the delta is negated.")
    num_steps: int | None = Field(None, description="Local steps of its training.")
    num_examples: int | None = Field(None, description="Examples that it was trained on.")


class DeltaRecipe(Recipe):
    """Which deltas there are, of which tensors, and where they are computed."""

    base: str = Field(
        description="The model that all were fine-tuned from: folder, file or hub id."
    )
    models: tuple[str | ModelEntry, ...] = Field(
        min_length=1,
        description="The fine-tuned models: folders, files or hub ids; in a file also mappings.",
    )
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
        last = [Path(entry.path).name for entry in plain]
        found: dict[str, ModelEntry] = {}
        for i, entry in enumerate(plain):
            is_short = last.count(last[i]) == 1 and last[i]
            name = wish = entry.name or (last[i] if is_short else entry.path)
            number = 2
            while name in found:
                name, number = f"{wish}#{number}", number + 1
            numbers: dict[str, Any] = {k: v[i] for k, v in self._numbers().items() if v is not None}
            numbers["weight"] = numbers.pop("weights", entry.weight)
            found[name] = entry.model_copy(update=numbers)
        return found

    @property
    def model_weights(self) -> Weights:
        """The weights of the models for all tensors. Raises DeltaflError if they are not one for
        each, or all 0.
        """
        numbers = [entry.weight for entry in self.entries.values()]
        default = [1.0 if number is None else number for number in numbers]
        patterns = self._weights_by_name()
        rows = {**patterns, "*": patterns.get("*", default)}
        return as_weights(rows, len(numbers))

    def _weights_by_name(self) -> Mapping[str, Sequence[float]]:
        return {}

    def _numbers(self) -> dict[str, tuple[float, ...] | None]:
        return {
            "weights": self.weights,
            "num_steps": self.num_steps,
            "num_examples": self.num_examples,
        }

    def problems(self) -> Iterator[str]:
        """Numbers that are not one for each model, or of which none counts."""
        n = len(self.models)
        found = [
            f"{key}: {len(values)} numbers for {n} models"
            for key, values in self._numbers().items()
            if values is not None and len(values) != n
        ]
        beside = any(isinstance(m, ModelEntry) and m.weight is not None for m in self.models)
        if self.weights is not None and beside:
            found.append("weights: given both as a list and beside the models; give one of them")
        try:
            _ = found or self.model_weights
        except DeltaflError as error:
            found += error.problems
        yield from found


class MergeRecipe(RuleParameters, DeltaRecipe):
    """One server step over fine-tuned models: base + server_lr times the rule's mean update."""

    alternatives: ClassVar = (("server_lr", "scaling_coef", "scale_patterns"),)

    method: str = Field("task_arithmetic", description="The rule (see `deltafl rules`).")
    server_lr: float | None = Field(
        None, description="The scale of the mean of deltas. Default: 1, the mean itself."
    )
    scaling_coef: float | None = Field(
        None, description="The scale of the sum of deltas (lambda), instead of --server-lr."
    )
    weight_patterns: dict[str, list[float]] = Field(
        {},
        description="Glob on the base's tensor names: one weight for each model; the first match.",
    )
    scale_patterns: dict[str, float] = Field(
        {},
        description="Glob on the base's tensor names: their scale, before the general one.",
    )
    dtype: Literal["float32", "float16", "bfloat16", "float64"] | None = Field(
        None, description="Of the output. Default: the base's."
    )
    exact: bool = Field(False, description="Compute in float64, round once.")
    max_shard_size: Size = Field(
        5_000_000_000, gt=0, description="Split the weights into files of at most this size."
    )
    hash: Annotated[bool, Incidental] = Field(
        False, description="Record the sha256 of every input file."
    )

    @property
    def stored_dtype(self) -> str | None:
        """The output's dtype in safetensors' spelling; None: the base's."""
        return CODES[self.dtype] if self.dtype else None

    def _weights_by_name(self) -> Mapping[str, Sequence[float]]:
        return self.weight_patterns

    def problems(self) -> Iterator[str]:
        """What is given twice, or does not fit the models."""
        if self.server_lr is not None and self.scaling_coef is not None:
            yield "server_lr and scaling_coef are two ways to say one thing; give one of them"
        yield from super().problems()
