"""DARE (arXiv 2311.03099): drop coordinates at random and rescale the rest, then merge by any other rule."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from deltafl.rules.rule import RULES, Rule, Source, Traits, Transform, all_in_range
from deltafl.rules.task_arithmetic import TaskArithmetic
from deltafl.rules.ties import Ties
from deltafl.rules.weights import PerModel, check_per_model, numbers_of

if TYPE_CHECKING:
    from torch import Tensor

LEVELS = 1 << 16


@dataclass(frozen=True)
class Drop:
    """Zero each coordinate with probability p (its model's, and tensor's) and scale the rest by 1 / (1 - p).

    The draws are keyed by (seed, model, tensor, block) and have 16 bits: p is rounded to a multiple of 2^-16, and the
    scale is that of the rounded p, so the expectation is exact. NaN and Inf are not dropped: they are to be refused.
    """

    drop_rate: PerModel
    seed: int

    density = None
    per_tensor = False

    def apply(self, block: Tensor, model: int, name: str, start: int, threshold: float) -> Tensor:
        import numpy as np
        import torch

        key = hashlib.blake2b(
            f"{self.seed}/{model}/{start}/{name}".encode(), digest_size=16
        ).digest()
        draws = np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little")))
        cut = round(numbers_of(self.drop_rate, name, model + 1)[model] * LEVELS)
        kept = torch.from_numpy(draws.integers(0, LEVELS, len(block), dtype=np.uint16) >= cut)
        return block.mul_(kept.to(block).mul_(LEVELS / (LEVELS - cut)))


@RULES.register("dare")
@dataclass(frozen=True)
class Dare:
    """R = inner rule of the dropped and rescaled deltas; the inner rule's reductions see those too."""

    drop_rate: PerModel
    inner: Rule = field(default_factory=TaskArithmetic)
    seed: int = 0

    def __post_init__(self) -> None:
        all_in_range("dare", "drop_rate", self.drop_rate, 0, 1 - 1 / LEVELS)

    @property
    def traits(self) -> Traits:
        inner = self.inner.traits
        return Traits(False, inner.odd, False, False, inner.native_scale)

    @property
    def transforms(self) -> tuple[Transform, ...]:
        return (Drop(self.drop_rate, self.seed), *self.inner.transforms)

    @classmethod
    def examples(cls) -> Iterable[Dare]:
        return (cls(0.5), cls(0.9, Ties(0.5)))

    def check(self, sources: Sequence[Source]) -> None:
        check_per_model("dare: drop_rate", self.drop_rate, len(sources))
