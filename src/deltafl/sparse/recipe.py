"""The settings of sparse training."""

from collections.abc import Iterator
from typing import Annotated, Literal, TypeAlias

from pydantic import Field

from deltafl.recipes import Recipe, one_of
from deltafl.sparse.strategies import MASK_STRATEGIES

Scope: TypeAlias = Literal["global", "per_layer"]
Calibration: TypeAlias = Literal["average", "progressive"]
FisherLabels: TypeAlias = Literal["sampled", "empirical"]


class SparseRecipe(Recipe):
    """Which coordinates train: a share of them, chosen before the first round, or a finished
    mask.
    """

    sparsity_ratio: float = Field(
        0.0, ge=0, lt=1, description="share of frozen coordinates; 0: all train"
    )
    mask_strategy: Annotated[str, one_of(lambda: MASK_STRATEGIES)] = Field(
        "least_sensitive",
        description="which coordinates train: least_sensitive, most_sensitive (Fisher scores), "
        "lowest_magnitude, highest_magnitude or random",
    )
    mask_scope: Scope = Field(
        "global", description="one threshold for all tensors, or one for each"
    )
    mask_file: str | None = Field(None, description="a mask that `deltafl mask` wrote")
    calibration: Calibration = Field(
        "average",
        description="average the scores of all rounds, or drop coordinates round by round",
    )
    calibration_rounds: int = Field(
        1, ge=1, description="rounds of scoring, each with fresh clients"
    )
    calibration_examples: int = Field(
        64, ge=1, description="examples that each client scores in a round"
    )
    fisher_labels: FisherLabels = Field(
        "sampled", description="score with targets that the model draws, or with those of the data"
    )
    fisher_draws: int = Field(1, ge=1, description="drawn targets for each example")

    def problems(self) -> Iterator[str]:
        if self.mask_file is not None and self.sparsity_ratio:
            yield (
                "mask_file is a finished mask, and sparsity_ratio asks for another; "
                "give one of them"
            )

    @property
    def is_sparse(self) -> bool:
        """Whether a mask is used."""
        return self.sparsity_ratio > 0 or self.mask_file is not None

    @property
    def is_calibrated(self) -> bool:
        """Whether Fisher scores are needed: a mask is to be made, by a strategy that reads them."""
        return self.sparsity_ratio > 0 and MASK_STRATEGIES[self.mask_strategy].scored
