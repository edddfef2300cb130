"""By chance."""

import torch
from torch import Tensor

from deltafl.sparse.strategies import strategy


@strategy("random", scored=False)
def random(scores: Tensor, weights: Tensor) -> Tensor:
    """All keys are alike, and ties are drawn."""
    return torch.zeros_like(weights)
