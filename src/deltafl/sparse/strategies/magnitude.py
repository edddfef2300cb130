"""By the size of weights."""

from torch import Tensor

from deltafl.sparse.strategies import strategy


@strategy("lowest_magnitude", scored=False)
def lowest_magnitude(scores: Tensor, weights: Tensor) -> Tensor:
    """The weights nearest to zero are kept."""
    return weights.abs()


@strategy("highest_magnitude", scored=False)
def highest_magnitude(scores: Tensor, weights: Tensor) -> Tensor:
    """The weights farthest from zero are kept."""
    return -weights.abs()
