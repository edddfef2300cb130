"""What a search judges merges by: goals, each a task with its scorers and the net to score."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from deltafl.algebra.aggregate import Aggregate, Stepped
from deltafl.algebra.deltas import Update
from deltafl.algebra.tensors import Tensors
from deltafl.merge.candidates import BASE, Row
from deltafl.models.net import Net
from deltafl.rules.rule import Rule, build_rule
from deltafl.rules.weights import as_weights, total_weight
from deltafl.training.step import TaskScorer


@dataclass(frozen=True)
class Goal:
    """A task: its net, how that is scored on validation and on test data, and its own fine-tune.

    The nets of all goals share the weights that candidates are loaded into; heads are their own.
    """

    name: str
    net: Net
    val: TaskScorer
    test: TaskScorer
    tuned: Tensors

    def mean(self, scorer: TaskScorer) -> float:
        """Mean score of the net as it is."""
        return float(scorer(self.net, torch.arange(len(scorer))).double().mean())


@dataclass(frozen=True)
class Problem:
    """Base, deltas, and the goals that merges are judged by. weights: one for each delta."""

    base: Tensors
    updates: Sequence[Update]
    goals: Sequence[Goal]
    weights: Sequence[float] | None = None
    threads: int = 1

    @property
    def total_weight(self) -> float:
        """sum_i |w_i|: server_lr / lambda."""
        return total_weight(as_weights(self.weights, len(self.updates)))

    def aggregate(self, rule: Rule) -> Aggregate:
        """The update that a rule makes of the deltas."""
        return Aggregate(rule, self.updates, self.weights, threads=self.threads)

    def load(self, update: Tensors | None, server_lr: float) -> None:
        """Put a candidate into the nets, tensor by tensor; update None: the base."""
        model = self.base if update is None else Stepped(self.base, update, server_lr)
        self.goals[0].net.load(model)

    def own_scores(self, *, test: bool = False) -> dict[str, float]:
        """Task -> mean score of its own model on validation or on test data."""
        found = {}
        for goal in self.goals:
            goal.net.load(goal.tuned)
            found[goal.name] = goal.mean(goal.test if test else goal.val)
        return found

    def test_scores(self, row: Row) -> dict[str, float]:
        """Task -> test score of a chosen candidate. Call it once for each row that is reported."""
        is_base = row.method == BASE.method
        update = None if is_base else self.aggregate(build_rule(row.method, row.params))
        self.load(update, row.server_lr)
        return {goal.name: goal.mean(goal.test) for goal in self.goals}
