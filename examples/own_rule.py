"""A rule of one's own: every delta counts with the same length. In src/deltafl/aggregators/ the command line has it.

python examples/own_rule.py
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from deltafl.rules.rule import NO_TRANSFORMS, RULES, Stats, Traits

if TYPE_CHECKING:
    from torch import (
        Tensor,
    )  # rules do not import torch: the command line reads them all at its start


@RULES.register("equal_length")
@dataclass(frozen=True)
class EqualLength:
    """c_i = p_i L / ||delta_i|| with L = sum_j p_j ||delta_j||; a zero delta stays zero."""

    traits = Traits()
    transforms = NO_TRANSFORMS
    needs_gram = True

    @classmethod
    def examples(cls) -> Iterable[EqualLength]:
        return (cls(),)

    def coefficients(self, stats: Stats, weights: Tensor) -> Tensor:
        assert stats.gram is not None
        norms = stats.gram.diagonal().sqrt()
        return weights * (weights @ norms) / norms.masked_fill(norms == 0, 1.0)


if __name__ == "__main__":
    import torch

    from deltafl import Source, Update, aggregate

    short, long = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 9.0])
    updates = [
        Update({"weight": delta}, Source(name))
        for name, delta in (("short", short), ("long", long))
    ]
    for name, tensor in aggregate(EqualLength(), updates):
        print(name, tensor.tolist())  # the mean length is 5, so half of (5, 5)
