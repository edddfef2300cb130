"""FedAvg (arXiv 1602.05629): the mean weighted by the number of examples."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from deltafl.errors import DeltaflError
from deltafl.rules.rule import NO_TRANSFORMS, RULES, Source, Stats, Traits

if TYPE_CHECKING:
    from torch import Tensor


@RULES.register("fedavg")
@dataclass(frozen=True)
class FedAvg:
    """c_i = p_i num_examples_i / sum_j p_j num_examples_j."""

    traits = Traits()
    transforms = NO_TRANSFORMS
    needs_gram = False

    @classmethod
    def examples(cls) -> Iterable[FedAvg]:
        return (cls(),)

    def check(self, sources: Sequence[Source]) -> None:
        problems = [
            f'fedavg: model "{s.name}": number of examples is {s.num_examples}; give it with --num-examples'
            for s in sources
            if s.num_examples is None or s.num_examples <= 0
        ]
        if problems:
            raise DeltaflError(*problems)

    def coefficients(self, stats: Stats, weights: Tensor) -> Tensor:
        share = weights * weights.new_tensor([float(s.num_examples or 0) for s in stats.sources])
        return share / share.sum()
