"""Coefficients learnt on validation labels: AdaMerging (arXiv 2310.02575) with supervision."""

from dataclasses import dataclass
from typing import Annotated, ClassVar

from deltafl.rules.rule import RULES, ExampleRule, Within


@RULES.register("learned")
@dataclass(frozen=True)
class Learned(ExampleRule):
    """R_k = sum_t l_tk delta_tk for each tensor k: the l by Adam on the tasks' validation losses.

    They start at 1 / n, and each of `adam_steps` steps sees a batch of each task. Deviation from
    AdaMerging, which minimises the entropy on unlabelled test images: that collapses where the base
    is surely wrong, and looks at the test split.
    """

    adam_steps: Annotated[int, Within(1)] = 150
    adam_lr: Annotated[float, Within(0)] = 0.01
    adam_batch: Annotated[int, Within(1)] = 32

    needs: ClassVar = "validation labels"
