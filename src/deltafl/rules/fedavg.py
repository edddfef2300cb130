"""FedAvg (arXiv 1602.05629): the mean weighted by the number of examples."""

from collections.abc import Sequence
from dataclasses import dataclass

from deltafl.rules.rule import RULES, LinearRule, Source, Stats, Tensor


@RULES.register("fedavg")
@dataclass(frozen=True)
class FedAvg(LinearRule):
    """c_i = p_i num_examples_i / sum_j p_j num_examples_j."""

    weighs_examples = True

    def problems(self, sources: Sequence[Source]) -> list[str]:
        return [
            f'fedavg: model "{s.name}": number of examples is {s.num_examples}; '
            "give it with --num-examples"
            for s in sources
            if s.num_examples is None or s.num_examples <= 0
        ]

    def coefficients(self, stats: Stats, weights: Tensor) -> Tensor:
        share = weights * weights.new_tensor([float(s.num_examples or 0) for s in stats.sources])
        return share / share.sum()
