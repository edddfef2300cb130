"""FedNova (arXiv 2007.07481): normalise each delta by the amount of local work behind it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from deltafl.rules.rule import RULES, LinearRule, Source, Stats, Tensor, Traits


@RULES.register("fednova")
@dataclass(frozen=True)
class FedNova(LinearRule):
    """c_i = p_i a_eff / a_i with a_eff = sum_j p_j a_j and a_i = ||a||_1 of FedNova's local solver.

    `normalizer` says what a_i is for tau = num_steps local steps: "sgd": tau (with equal weights
    the form of arXiv 2411.18607, c_i = mean(tau) / (n tau_i)); "momentum": (tau - m (1 - m^tau) /
    (1 - m)) / (1 - m) for heavy-ball momentum m; "prox": (1 - (1 - lr mu)^tau) / (lr mu) for
    FedProx with coefficient mu.
    """

    normalizer: Literal["sgd", "momentum", "prox"] = "sgd"

    traits = Traits(fixed_point=False)

    def problems(self, sources: Sequence[Source]) -> list[str]:
        problems = []
        for s in sources:
            model = f'fednova: model "{s.name}"'
            if s.num_steps is None or s.num_steps <= 0:
                problems.append(
                    f"{model}: number of local steps is {s.num_steps}; give it with --num-steps"
                )
            if self.normalizer == "momentum" and (s.momentum is None or not 0 <= s.momentum < 1):
                problems.append(
                    f"{model}: momentum is {s.momentum}; it must be in [0, 1), in training.json"
                )
            if self.normalizer == "prox" and not 0 < (s.lr or 0) * (s.prox_mu or 0) < 1:
                problems.append(
                    f"{model}: lr is {s.lr}, prox_mu is {s.prox_mu}; "
                    "their product must be in (0, 1), in training.json"
                )
        return problems

    def work(self, source: Source) -> float:
        """a_i, the accumulated local gradient weight of one source, in local steps."""
        tau = float(source.num_steps or 0)
        if self.normalizer == "momentum" and source.momentum:
            m = source.momentum
            return (tau - m * (1 - m**tau) / (1 - m)) / (1 - m)
        if self.normalizer == "prox":
            shrink = (source.lr or 0.0) * (source.prox_mu or 0.0)
            return -math.expm1(tau * math.log1p(-shrink)) / shrink
        return tau

    def coefficients(self, stats: Stats, weights: Tensor) -> Tensor:
        work = weights.new_tensor([self.work(s) for s in stats.sources])
        return weights * (weights * work).sum() / work
