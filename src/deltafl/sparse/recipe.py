"""The settings of masks."""

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from deltafl.recipes import OneOf, Recipe
from deltafl.sparse.masks import MASK_STRATEGIES


class SparseRecipe(Recipe):
    """Which share of the coordinates is frozen, and how it is chosen."""

    sparsity_ratio: float = Field(0.0, ge=0, lt=1, description="share of frozen coordinates")
    mask_strategy: Annotated[str, OneOf(lambda: MASK_STRATEGIES)] = Field(
        "least_sensitive",
        description="which coordinates train: least_sensitive, most_sensitive, lowest_magnitude, "
        "highest_magnitude or random",
    )
    mask_scope: Literal["global", "per_layer"] = Field(
        "global", description="whether the share is of the whole model or of each tensor"
    )
    mask_file: str | None = Field(
        None, description="a mask that `deltafl mask` wrote, instead of a calibration"
    )
    calibration: Literal["average", "progressive"] = Field(
        "average", description="one threshold at the end, or fewer coordinates after each round"
    )
    calibration_rounds: int = Field(
        1, ge=1, description="rounds of scoring, each with fresh clients"
    )
    calibration_examples: int = Field(
        64, ge=1, description="most examples that a client scores in a round"
    )
    fisher_labels: Literal["sampled", "empirical", "exact"] = Field(
        "sampled", description="whose labels scores are of: the model's, the data's, or all"
    )
    fisher_draws: int = Field(1, ge=1, description="labels drawn for each example")

    @property
    def is_sparse(self) -> bool:
        """Whether a mask is used."""
        return self.sparsity_ratio > 0 or self.mask_file is not None

    @property
    def is_calibrated(self) -> bool:
        """Whether examples are scored: there is a mask to make, and its strategy needs scores."""
        wanted = self.sparsity_ratio > 0 and self.mask_file is None
        return wanted and MASK_STRATEGIES[self.mask_strategy].needs_scores

    def problems(self) -> Iterator[str]:
        if self.mask_file is not None and self.sparsity_ratio:
            yield (
                "mask_file is a finished mask, and sparsity_ratio asks for another; "
                "give one of them"
            )
