"""DARE (arXiv 2311.03099): drop coordinates at random, rescale the rest, merge by another rule."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal, TypeAlias

from deltafl.rules.rule import RULES, Rule, Source, Tensor, Threshold, Traits, Transform, Within
from deltafl.rules.task_arithmetic import TaskArithmetic
from deltafl.rules.weights import PerModel, number_of

LEVELS = 1 << 16

MEAN = TaskArithmetic()

Rescale: TypeAlias = Literal["probability", "l1", "none"]
"""What is kept is divided by the probability of that; or multiplied so that the magnitudes of its
tensor sum to what they did before, as in mergekit; or left as it is.
"""


def thinned(block: Tensor, cut: Tensor | int, key: str, rescale: Rescale) -> Tensor:
    """Zero each coordinate with probability cut / 2^16, one for all or (*shape); rescale the rest.

    The draws, of 16 bits, are keyed by `key`. NaN and Inf are not dropped: they are to be refused.
    The block is overwritten.
    """
    import numpy as np
    import torch

    digest = hashlib.blake2b(key.encode(), digest_size=16).digest()
    generator = np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))
    draws = generator.integers(0, LEVELS, tuple(block.shape), dtype=np.uint16)
    kept = np.asarray(draws >= (cut if isinstance(cut, int) else cut.cpu().numpy()))
    factors = torch.from_numpy(kept).to(block)
    if rescale == "probability":
        factors.mul_(LEVELS / (LEVELS - cut))
    before = block.abs().sum(dtype=torch.float64) if rescale == "l1" else 0.0
    block.mul_(factors)
    if rescale == "l1" and (after := block.abs().sum(dtype=torch.float64)) > 0:
        block.mul_(float(before / after))
    return block


@dataclass(frozen=True)
class Drop(Transform):
    """`thinned` by a probability for each model and tensor, keyed by seed, model, tensor and block.

    It is rounded to a multiple of 2^-16, and what is kept is divided by the rounded one, so the
    expectation is exact.
    """

    drop_rate: PerModel
    seed: int
    rescale: Rescale = "probability"

    @property
    def whole(self) -> bool:
        return self.rescale == "l1"

    def apply(
        self, block: Tensor, model: int, name: str, start: int, threshold: Threshold
    ) -> Tensor:
        cut = round(number_of(self.drop_rate, name, model) * LEVELS)
        return thinned(block, cut, f"{self.seed}/{model}/{start}/{name}", self.rescale)


class SparseRule(Rule, ABC):
    """R = the rule `inner` of the deltas that `sparsify` leaves; its reductions see those too."""

    inner: Rule

    @property
    @abstractmethod
    def sparsify(self) -> Transform: ...

    @property
    def core(self) -> Rule:
        return self.inner.core

    @property
    def traits(self) -> Traits:
        traits = self.inner.traits
        return replace(traits, fixed_point=False, coordinate_symmetric=False, order_free=False)

    @property
    def transforms(self) -> tuple[Transform, ...]:
        return (self.sparsify, *self.inner.transforms)

    def problems(self, sources: Sequence[Source]) -> list[str]:
        return super().problems(sources) + self.inner.problems(sources)


@RULES.register("dare")
@dataclass(frozen=True)
class Dare(SparseRule):
    """R = the rule `inner` of the dropped and rescaled deltas, which its reductions see too.

    rescale: by 1 / (1 - drop_rate), "probability"; or by sum|delta| / sum|kept| of each tensor,
    "l1", as in mergekit; or "none".
    """

    drop_rate: Annotated[PerModel, Within(0, 1 - 1 / LEVELS)]
    inner: Rule = MEAN
    seed: int = 0
    rescale: Rescale = "probability"

    values: ClassVar = {"drop_rate": 0.5}

    @property
    def sparsify(self) -> Transform:
        return Drop(self.drop_rate, self.seed, self.rescale)
