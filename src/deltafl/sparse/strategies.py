"""Mask strategies: what makes a coordinate worth training. A new one is registered here."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from deltafl.registry import Registry


@dataclass(frozen=True)
class Strategy:
    """keys: the values of one tensor -> keys in its shape; coordinates with small keys are kept,
    equal ones are drawn. scored: whether the values are Fisher scores; else they are the weights.
    """

    keys: Callable[[Tensor], Tensor]
    scored: bool = False


MASK_STRATEGIES: Registry[Strategy] = Registry("mask strategy")
# arXiv 2504.02620 trains the least sensitive.
MASK_STRATEGIES.register("least_sensitive")(Strategy(lambda scores: scores, scored=True))
MASK_STRATEGIES.register("most_sensitive")(Strategy(torch.neg, scored=True))
MASK_STRATEGIES.register("lowest_magnitude")(Strategy(torch.abs))
MASK_STRATEGIES.register("highest_magnitude")(Strategy(lambda weights: -weights.abs()))
MASK_STRATEGIES.register("random")(Strategy(torch.zeros_like))
