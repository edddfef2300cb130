"""By Fisher scores (arXiv 2504.02620 trains the least sensitive)."""

from torch import Tensor

from deltafl.sparse.strategies import strategy


@strategy("least_sensitive", scored=True)
def least_sensitive(scores: Tensor, weights: Tensor) -> Tensor:
    """The smallest scores are kept."""
    return scores


@strategy("most_sensitive", scored=True)
def most_sensitive(scores: Tensor, weights: Tensor) -> Tensor:
    """The largest scores are kept."""
    return -scores
