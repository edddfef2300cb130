"""What a search judges: tasks that score a model example by example, and the working model that candidates go into."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from deltafl.algebra.aggregate import Stepped, WeightsLike, as_weights, sum_scale
from deltafl.algebra.deltas import Update
from deltafl.algebra.tensors import Tensors
from deltafl.errors import DeltaflError
from deltafl.merge.candidates import Row
from deltafl.merge.race import Finish

Metric = Literal["normalized", "absolute"]


class Working(Protocol):
    """A model in memory that takes other weights and that scorers judge."""

    def load(self, tensors: Tensors) -> object: ...


class Scorer(Protocol):
    """`(model, ids) -> per-example scores`; see `deltafl.training.step.Scorer`."""

    def __len__(self) -> int: ...

    def __call__(self, model: Any, ids: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Goal:
    """One task: how it is scored on validation and on test data, and the model that was fine-tuned for it."""

    name: str
    val: Scorer
    test: Scorer
    single: Tensors


@dataclass(frozen=True)
class Problem:
    """Base, deltas and goals, and the working model into which every candidate is loaded."""

    model: Working
    base: Tensors
    updates: Sequence[Update]
    goals: Sequence[Goal]
    weights: WeightsLike = None
    threads: int = 1


@dataclass(frozen=True)
class Judged:
    """Loads candidates into the working model and scores them.

    single: task -> validation score of its own model. correct: label of a row that was judged on everything -> task
    -> scores (N,); `row` adds to it.
    """

    problem: Problem
    single: Mapping[str, float]
    metric: Metric
    correct: dict[str, dict[str, Tensor]] = field(default_factory=dict)

    def scores(self, row: Row, update: Tensors | None, ids: Sequence[Tensor]) -> list[Tensor]:
        """Of each task at its ids; update None: of the base."""
        problem = self.problem
        tensors = problem.base
        if update is not None:
            weights = as_weights(problem.weights, len(problem.updates))
            tensors = dict(Stepped(problem.base, update, sum_scale(weights, row.scaling_coef)))
        problem.model.load(tensors)
        return [
            g.val(problem.model, i) if len(i) else torch.empty(0)
            for g, i in zip(problem.goals, ids, strict=True)
        ]

    def row(self, row: Row, finish: Finish) -> Row:
        """The row with what its scores say."""
        scores = dict(zip((g.name for g in self.problem.goals), finish.scores, strict=True))
        if finish.dropped_at is None:
            self.correct[row.label] = scores
        val = {name: float(s.double().mean()) for name, s in scores.items()}
        value = metric_value(val, self.single, self.metric)
        return replace(
            row, val=val, value=value, evaluated=finish.evaluated, dropped_at=finish.dropped_at
        )


def single_scores(problem: Problem, metric: Metric) -> dict[str, float]:
    """Validation score of each task's own model, measured once."""
    single = {}
    for goal in problem.goals:
        problem.model.load(goal.single)
        single[goal.name] = float(
            goal.val(problem.model, torch.arange(len(goal.val))).double().mean()
        )
        if metric == "normalized" and not single[goal.name] > 0:
            raise DeltaflError(
                f'task "{goal.name}": its own model scores {single[goal.name]:g} on validation data, so scores cannot '
                "be normalised by it; use metric: absolute, or check model, head and data"
            )
    return single


def metric_value(scores: Mapping[str, float], single: Mapping[str, float], metric: Metric) -> float:
    """Mean over tasks of score / single-task score, or of the score."""
    values = [s / single[n] if metric == "normalized" else s for n, s in scores.items()]
    return sum(values) / len(values)
