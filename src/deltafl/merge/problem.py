"""What a search judges: base and deltas, the tasks, and how their scores are weighed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeAlias

from torch import Tensor

from deltafl.algebra.aggregate import Stepped
from deltafl.algebra.tensors import Lazy, Tensors
from deltafl.errors import DeltaflError
from deltafl.merge.candidates import BASE, Row
from deltafl.merge.examples import example_update
from deltafl.merge.inputs import Opened
from deltafl.merge.layerwise import Examples
from deltafl.merge.plan import Facts
from deltafl.merge.updates import filed
from deltafl.models.net import Net
from deltafl.rules.building import build_rule
from deltafl.rules.rule import ExampleRule, Rule
from deltafl.tasks.task import Split, Task
from deltafl.training.step import scores

Scale: TypeAlias = tuple[float, float]
"""Zero and unit of a task's scores."""


@dataclass(frozen=True)
class Goal:
    """A task, the net that does it, and its own fine-tune.

    The nets of all goals share the weights that candidates are loaded into; heads are their own.
    """

    task: Task
    net: Net
    tuned: Tensors
    batch_size: int = 256

    def scores(self, split: Split, ids: Tensor | None = None) -> Tensor:
        """Of the net as it is, for each example of a split, (N,), or of those at `ids`."""
        return scores(self.net, self.task, split, ids, self.batch_size)


@dataclass(frozen=True)
class Problem:
    """Base and deltas, and the goals that merges of them are judged by.

    scratch: a folder for what rules of whole tensors make, which costs more than reading it again.
    found: what rules that need examples made, and what they report.
    """

    opened: Opened
    goals: Sequence[Goal]
    scratch: Path
    made: dict[str, Lazy] = field(default_factory=dict)
    found: dict[Rule, tuple[Lazy, Facts]] = field(default_factory=dict)

    def update(self, rule: Rule) -> Lazy:
        """What a rule makes of the deltas; one of whole tensors or of examples runs once."""
        core = rule.core
        if not isinstance(core, ExampleRule):
            if (key := repr(rule)) not in self.made:
                update = self.opened.aggregate(rule)
                if not update.whole:
                    return update
                self.made[key] = filed(update, self.scratch, self.opened.threads)
            return self.made[key]
        if core not in self.found:
            known = [partial(Examples, goal.net, goal.task) for goal in self.goals]
            self.found[core] = example_update(core, self.opened, known)
        return self.found[core][0]

    def load(self, update: Tensors | None, server_lr: float) -> None:
        """Put a candidate into the nets, tensor by tensor; update None: the base."""
        base = self.opened.base
        self.goals[0].net.load(base if update is None else Stepped(base, update, server_lr))

    def own_scores(self, split: Split) -> dict[str, float]:
        """Task -> mean score of its own model."""
        found = {}
        for goal in self.goals:
            goal.net.load(goal.tuned)
            found[goal.task.name] = mean_score(goal.scores(split))
        return found

    def scores(self, row: Row, split: Split) -> dict[str, float]:
        """Task -> mean score of a candidate. Of test once for each row that is reported."""
        update = None
        if row.method != BASE.method:
            update = self.update(build_rule(row.method, row.params))
        self.load(update, row.server_lr)
        return {goal.task.name: mean_score(goal.scores(split)) for goal in self.goals}

    def scales(self, own: Mapping[str, float], base: Mapping[str, float]) -> list[Scale]:
        """Of each task, from the mean scores of its own model and of the base, what scores are
        normalised by: 0 and the model's, if they are ratios, else the base's and what the model
        gained.

        Raises:
            DeltaflError: the model does not score above that.
        """
        scales = []
        for task in (goal.task for goal in self.goals):
            zero, score = 0.0 if task.ratio_scaled else base[task.name], own[task.name]
            if not score > zero:
                raise DeltaflError(
                    f'task "{task.name}": its own model scores {score:g}, not above {zero:g}, so '
                    "scores cannot be normalised by it; use metric: absolute, or check model, head "
                    "and data"
                )
            scales.append((zero, score - zero))
        return scales


def mean_score(values: Tensor) -> float:
    """In float64."""
    return float(values.double().mean())
