"""Choose method and coefficients on validation data, exhaustively or by racing.

A candidate is (method, its parameters, lambda). Everything that a search knows of tasks are scores,
example by example. The update of a method is computed once and reused for every lambda; candidates
whose models have the same bits are one, whatever methods and parameters they come from.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from statistics import fmean
from typing import TypeAlias

import torch
from torch import Tensor

from deltafl.algebra.deltas import Deltas
from deltafl.algebra.reductions import gram_matrix
from deltafl.merge.candidates import BASE, Method, Row, grid_of
from deltafl.merge.problem import Problem, Scale, mean_score
from deltafl.merge.race import looks, orders, race
from deltafl.merge.search_recipe import SearchRecipe
from deltafl.merge.updates import UpdateCache
from deltafl.progress import OnProgress, Progress, ignore
from deltafl.rules.building import build_rule
from deltafl.rules.rule import ExampleRule
from deltafl.rules.weights import total_weight


@dataclass(frozen=True)
class SearchResult:
    """Every row in the order tried, the base first, and what they are measured against.

    single: task -> validation score of its own model. scores: label of a row that was evaluated on
    all validation data -> task -> scores (N,). gram: of the deltas, (n, n) float64. val_examples:
    of all tasks together.
    """

    rows: Sequence[Row]
    single: Mapping[str, float]
    scores: Mapping[str, Mapping[str, Tensor]]
    gram: Tensor
    val_examples: int

    @property
    def base(self) -> Row:
        """The row of the base."""
        return self.rows[0]

    @property
    def best(self) -> Row:
        """The row to use; of equal values the first."""
        return max(self.rows, key=lambda row: row.rank)

    @property
    def best_of(self) -> dict[str, Row]:
        """Method -> its best row; where all were dropped, the one that lasted longest."""
        found: dict[str, Row] = {}
        for row in self.rows[1:]:
            found[row.method] = max(found.get(row.method, row), row, key=lambda row: row.rank)
        return found

    @property
    def examples(self) -> dict[str, int]:
        """Examples that candidates were `evaluated` on, and that an `exhaustive` search takes."""
        seen = [row.evaluated for row in self.rows if row.evaluated is not None]
        return {"evaluated": sum(seen), "exhaustive": len(seen) * self.val_examples}

    @property
    def curves(self) -> dict[str, list[list[float]]]:
        """Method -> [lambda, best value over its other parameters]; lambda 0 is the base, with
        which a curve of several points begins.
        """
        found: dict[str, dict[float, float]] = {}
        for row in self.rows[1:]:
            best = found.setdefault(row.method, {})
            best[row.scaling_coef] = max(best.get(row.scaling_coef, row.value), row.value)
        return {
            method: sorted(
                map(list, (best if len(best) == 1 else best | {0.0: self.base.value}).items())
            )
            for method, best in found.items()
        }


def search(
    problem: Problem, recipe: SearchRecipe, on_progress: OnProgress = ignore
) -> SearchResult:
    """Evaluate the candidates of `recipe` on the validation data; the base (lambda 0) is one.

    grid "paper": coefficients in each method's own convention: a rule whose paper averages has
    server_lr = value; "default": they are lambda, on the sum, for all. metric "normalized": mean
    over tasks of (score - zero) / unit (see `Problem.scales`); "absolute": mean score.

    strategy "exhaustive": every candidate on all validation data. "racing": see `race`, which
    `confidence` and `seed` (of the subsets) are for; rows that are dropped hold estimates and are
    not chosen. each_method: one race for each method, so that the best of every method is exact.
    memory: bytes of updates that a race holds; see `UpdateCache`.

    Raises:
        DeltaflError: as `Problem.scales`, under "normalized".
    """
    opened, apart = problem.opened, recipe.each_method or recipe.strategy == "exhaustive"
    gram = gram_matrix(Deltas(opened.updates, opened.weights), opened.threads)
    norms = gram.diagonal().sqrt().tolist()
    contests = [[(m, point) for point in grid_of(m, given, norms)] for m, given in recipe.grids]
    points = list(chain.from_iterable(contests))
    if recipe.strategy == "exhaustive":
        contests = [[point] for point in points]
    single = problem.own_scores("val")
    scales = [(0.0, 1.0)] * len(single)
    if recipe.metric == "normalized":
        ratios = all(goal.task.ratio_scaled for goal in problem.goals)
        scales = problem.scales(single, {} if ratios else problem.scores(BASE, "val"))
    tried = _Tried(
        problem, recipe, scales, 1 + len(points) * len(recipe.scaling_coefs), on_progress
    )
    for contest in ([], *contests) if apart else (points,):  # the base with none, or with all
        tried.race(contest)
    rows, kept = tried.results()
    return SearchResult(rows, single, kept, gram, sum(tried.looks[-1]))


Model: TypeAlias = tuple[str, float]
"""What tells the bits of a candidate: the digest of its update, and the float32 factor of that."""


class _Tried:
    """The rows tried so far, and the scores of their models, each of which is evaluated once.

    scales: of each task. total: rows at the end, for progress.
    """

    def __init__(
        self,
        problem: Problem,
        recipe: SearchRecipe,
        scales: Sequence[Scale],
        total: int,
        on_progress: OnProgress,
    ) -> None:
        self.problem, self.recipe, self.scales = problem, recipe, scales
        self.updates = UpdateCache(recipe.memory, problem.opened.threads)
        self.tell = lambda done: on_progress(Progress("search on validation", done, total))
        self.rows: list[tuple[Row, Model]] = [(BASE, ("", 0.0))]
        self.seen: dict[Model, list[Tensor]] = {}
        sizes = [goal.task.size("val") for goal in problem.goals]
        self.looks, self.orders = [sizes], [torch.arange(size) for size in sizes]
        if recipe.strategy == "racing":
            self.looks, self.orders = looks(sizes), orders(sizes, recipe.seed or 0)

    def add(self, method: str, params: Mapping[str, object]) -> None:
        """Add a row for each coefficient of a method. Lambda 0 is the base for any update."""
        total, rule = total_weight(self.problem.opened.weights), build_rule(method, params)
        update = self.updates.add(self.problem.update(rule))
        averages = self.recipe.grid == "paper" and rule.traits.native_scale == "mean"
        fixed = isinstance(rule.core, ExampleRule)  # at scale 1
        for value in (1 / total,) if fixed else self.recipe.scaling_coefs:
            coef = value / total if averages else value
            factor = float(torch.tensor(coef * total, dtype=torch.float32))
            model = (update, factor) if coef else self.rows[0][1]
            self.rows.append((Row(method, params, coef, coef * total), model))

    def race(self, points: Sequence[Method]) -> None:
        """Race the models of some points, the first time with the base; with one look that is to
        evaluate them.
        """
        start = len(self.rows) if self.seen else 0
        for point in points:
            self.add(*point)
        runners = list(dict.fromkeys(model for _, model in self.rows[start:]))

        def judge(alive: Sequence[int], look: int) -> list[Tensor]:
            models, counts = [runners[i] for i in alive], self.looks[look]
            self.updates.keep({update for update, _ in models})
            dropped = start + len(runners) - len(models)
            for done, model in enumerate(sorted(models), 1):  # those of one update together
                self.evaluate(model, counts)
                self.tell(dropped + done * (counts == self.looks[-1]))
            tables = zip(*(self.seen[model] for model in models), strict=True)
            return [
                torch.stack([scores[:count] for scores in table])
                for table, count in zip(tables, counts, strict=True)
            ]

        worth = [1 / unit for _, unit in self.scales]
        race(judge, len(runners), self.looks, worth, self.recipe.confidence)
        self.tell(len(self.rows))

    def evaluate(self, model: Model, counts: Sequence[int]) -> None:
        """Score a model on so many examples of each task, if another race has not done it."""
        seen = self.seen.setdefault(model, [torch.empty(0)] * len(counts))
        if sum(map(len, seen)) < sum(counts):
            update, factor = model
            self.problem.load(self.updates.get(update) if update else None, factor)
            for t, goal in enumerate(self.problem.goals):
                new = goal.scores("val", self.orders[t][len(seen[t]) : counts[t]])
                seen[t] = torch.cat([seen[t], new])

    def results(self) -> tuple[list[Row], dict[str, dict[str, Tensor]]]:
        """The rows with what is known of their models; label -> task -> scores of all examples."""
        rows, labels, kept = [], dict[Model, str](), dict[str, dict[str, Tensor]]()
        names = [goal.task.name for goal in self.problem.goals]
        for row, model in self.rows:
            seen = {
                name: scores[order[: len(scores)].argsort()]
                for name, scores, order in zip(names, self.seen[model], self.orders, strict=True)
            }
            val = {name: mean_score(scores) for name, scores in seen.items()}
            scaled = zip(val.values(), self.scales, strict=True)
            values = [(score - zero) / unit for score, (zero, unit) in scaled]
            look = 1 + self.looks.index([*map(len, seen.values())])
            dropped_at = look if look < len(self.looks) else None
            row = replace(row, val=val, value=fmean(values), dropped_at=dropped_at)
            if model in labels:
                rows.append(replace(row, same_as=labels[model]))
                continue
            labels[model] = row.label
            rows.append(replace(row, evaluated=sum(self.looks[look - 1])))
            if dropped_at is None:
                kept[row.label] = seen
        return rows, kept
