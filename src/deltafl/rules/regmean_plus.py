"""RegMean++ (arXiv 2508.03121): RegMean on the inputs that merged earlier maps give."""

from dataclasses import dataclass

from deltafl.rules.rule import RULES, LayerRule


@RULES.register("regmean++")
@dataclass(frozen=True)
class RegMeanPlus(LayerRule):
    """RegMean++ (arXiv 2508.03121): RegMean on the inputs that merged earlier maps give."""

    inputs = ("merged", "merged")
