"""A rule of one's own: every delta counts with the same length. In src/deltafl/rules/ the command line has it.

python examples/own_rule.py
"""

from dataclasses import dataclass

from deltafl.rules.rule import RULES, LinearRule, Stats, Tensor


@RULES.register("equal_length")
@dataclass(frozen=True)
class EqualLength(LinearRule):
    """c_i = p_i L / ||delta_i|| with L = sum_j p_j ||delta_j||; a zero delta stays zero."""

    needs_gram = True

    def coefficients(self, stats: Stats, weights: Tensor) -> Tensor:
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
