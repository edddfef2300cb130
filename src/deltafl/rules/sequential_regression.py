"""Sequential regression with cross terms: each map is asked for what the fine-tune computes."""

from dataclasses import dataclass

from deltafl.rules.rule import RULES, LayerRule


@RULES.register("sequential_regression")
@dataclass(frozen=True)
class SequentialRegression(LayerRule):
    """Sequential regression with cross terms: each map is asked for what the fine-tune computes."""

    inputs = ("tuned", "merged")
