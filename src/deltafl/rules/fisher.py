"""Fisher merging (arXiv 2111.09832): weigh each coordinate by what it matters to each task."""

from dataclasses import dataclass

from deltafl.rules.rule import RULES, ExampleRule


@RULES.register("fisher")
@dataclass(frozen=True)
class Fisher(ExampleRule):
    """R = sum_t p_t F_t delta_t / sum_t p_t F_t for each coordinate.

    F_t: the diagonal Fisher information of fine-tune t, of targets drawn from the model, plus 1e-9
    of its mean over the tensor. What does not train is moved by the mean of the deltas. Scale 1.
    """
