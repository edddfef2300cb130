"""Mask strategies: what makes a coordinate worth training. A file of this folder registers its
own.
"""

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor

from deltafl.registry import Registry

Keys: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""(scores, weights) of one tensor -> its keys in its shape; coordinates with small keys are
kept.
"""


@dataclass(frozen=True)
class Strategy:
    """scored: whether `keys` reads the scores; without it they are the weights again."""

    keys: Keys
    scored: bool


MASK_STRATEGIES: Registry[Strategy] = Registry("mask strategy")


def strategy(name: str, *, scored: bool) -> Callable[[Keys], Keys]:
    """Register a function as the mask strategy `name`."""

    def add(keys: Keys) -> Keys:
        MASK_STRATEGIES.register(name)(Strategy(keys, scored))
        return keys

    return add


for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
