"""RegMean (arXiv 2212.09849) with bias and ridge: least squares on the inputs of each map."""

from dataclasses import dataclass

from deltafl.rules.rule import RULES, LayerRule


@RULES.register("regmean")
@dataclass(frozen=True)
class RegMean(LayerRule):
    """RegMean (arXiv 2212.09849) with bias and ridge: least squares on the inputs of each map."""

    inputs = ("tuned", "tuned")
