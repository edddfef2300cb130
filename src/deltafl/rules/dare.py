"""DARE (arXiv 2311.03099): drop coordinates at random, rescale the rest, merge by another rule."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

from deltafl.rules.rule import RULES, Rule, Source, Tensor, Threshold, Traits, Transform, Within
from deltafl.rules.task_arithmetic import TaskArithmetic
from deltafl.rules.weights import PerModel, numbers_missing, numbers_of

LEVELS = 1 << 16

MEAN = TaskArithmetic()


@dataclass(frozen=True)
class Drop(Transform):
    """Zero each coordinate with probability p, by model and tensor; scale the rest by 1 / (1 - p).

    The draws are keyed by (seed, model, tensor, block) and have 16 bits: p is rounded to a multiple
    of 2^-16, and the scale is that of the rounded p, so the expectation is exact. NaN and Inf are
    not dropped: they are to be refused.
    """

    drop_rate: PerModel
    seed: int

    def apply(
        self, block: Tensor, model: int, name: str, start: int, threshold: Threshold
    ) -> Tensor:
        import numpy as np
        import torch

        key = f"{self.seed}/{model}/{start}/{name}".encode()
        digest = hashlib.blake2b(key, digest_size=16).digest()
        draws = np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))
        cut = round(numbers_of(self.drop_rate, name, model + 1)[model] * LEVELS)
        kept = torch.from_numpy(draws.integers(0, LEVELS, len(block), dtype=np.uint16) >= cut)
        return block.mul_(kept.to(block).mul_(LEVELS / (LEVELS - cut)))


@RULES.register("dare")
@dataclass(frozen=True)
class Dare(Rule):
    """R = inner rule of the dropped and rescaled deltas, which its reductions see too."""

    drop_rate: Annotated[PerModel, Within(0, 1 - 1 / LEVELS)]
    inner: Rule = MEAN
    seed: int = 0

    values: ClassVar = {"drop_rate": 0.5}

    @property
    def core(self) -> Rule:
        return self.inner.core

    @property
    def traits(self) -> Traits:
        traits = self.inner.traits
        return replace(traits, fixed_point=False, coordinate_symmetric=False, order_free=False)

    @property
    def transforms(self) -> tuple[Transform, ...]:
        return (Drop(self.drop_rate, self.seed), *self.inner.transforms)

    def problems(self, sources: Sequence[Source]) -> list[str]:
        wrong = numbers_missing("dare: drop_rate", self.drop_rate, len(sources))
        return wrong + self.inner.problems(sources)
