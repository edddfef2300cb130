"""Choose method and coefficients on validation data, exhaustively or by racing.

A candidate is (method, its parameters, lambda). Everything that a search knows of tasks are scores,
example by example. The update of a method is computed once and reused for every lambda; candidates
whose models have the same bits are one, whatever methods and parameters they come from.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain

import torch
from torch import Tensor

from deltafl.algebra.deltas import Deltas
from deltafl.algebra.reductions import gram_matrix
from deltafl.errors import DeltaflError
from deltafl.merge.candidates import BASE, Method, Row, check_methods, grid_of
from deltafl.merge.problem import Problem
from deltafl.merge.race import looks, orders, race
from deltafl.merge.search_recipe import SearchRecipe
from deltafl.merge.updates import UpdateCache
from deltafl.progress import OnProgress, Progress, ignore
from deltafl.rules.rule import build_rule
from deltafl.rules.weights import as_weights


@dataclass(frozen=True)
class SearchResult:
    """Every row in the order tried, the base first, and what they are measured against.

    single: task -> validation score of its own model. scores: label of a row that was evaluated on
    all validation data -> task -> scores (N,). gram: of the deltas, (n, n) float64. val_examples:
    of all tasks together.
    """

    rows: tuple[Row, ...]
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
    def norms(self) -> list[float]:
        """Of the deltas."""
        return self.gram.diagonal().sqrt().tolist()

    @property
    def examples(self) -> dict[str, int]:
        """Examples that candidates were `evaluated` on, and that an `exhaustive` search takes."""
        seen = [row.evaluated for row in self.rows if row.evaluated is not None]
        return {"evaluated": sum(seen), "exhaustive": len(seen) * self.val_examples}

    @property
    def curves(self) -> dict[str, list[list[float]]]:
        """Method -> [lambda, best value over its other parameters]; lambda 0 is the base."""
        found: dict[str, dict[float, float]] = {}
        for row in self.rows[1:]:
            best = found.setdefault(row.method, {0.0: self.base.value})
            best[row.scaling_coef] = max(best.get(row.scaling_coef, row.value), row.value)
        return {method: sorted(map(list, best.items())) for method, best in found.items()}


def search(
    problem: Problem, recipe: SearchRecipe, on_progress: OnProgress = ignore
) -> SearchResult:
    """Evaluate the candidates of `recipe` on the validation data; the base (lambda 0) is one.

    grid "paper": coefficients in each method's own convention: a rule whose paper averages has
    server_lr = value; "default": they are lambda, on the sum, for all. metric "normalized": mean
    over tasks of score / score of the task's own model; "absolute": mean score.

    strategy "exhaustive": every candidate on all validation data. "racing": see `race`, which
    `confidence` and `seed` (of the subsets) are for; rows that are dropped hold estimates and are
    not chosen. each_method: one race for each method, so that the best of every method is exact.
    memory: bytes of updates that a race holds; those above it are computed again at every look.

    Raises:
        DeltaflError: a method or parameter does not fit, or a task's own model does not score
            above 0 under "normalized".
    """
    check_methods(recipe.grids, [u.source for u in problem.updates])
    weights = as_weights(problem.weights, len(problem.updates))
    gram = gram_matrix(Deltas(problem.updates, weights), problem.threads)
    norms = gram.diagonal().sqrt().tolist()
    grids = [[(m, point) for point in grid_of(m, given, norms)] for m, given in recipe.grids]
    points = list(chain.from_iterable(grids))
    single = problem.own_scores()
    units = [_unit(task, score, recipe.metric) for task, score in single.items()]
    tried = _Tried(problem, recipe, units, 1 + len(points) * len(recipe.scaling_coefs), on_progress)
    contests = grids if recipe.each_method else [points]
    if recipe.strategy == "exhaustive":
        contests = [[point] for point in points]
    if apart := recipe.each_method or recipe.strategy == "exhaustive":
        tried.race(0)
    for contest in contests:
        start = len(tried.rows) if apart else 0
        tried.add(contest)
        tried.race(start)
    rows, scores = tried.results()
    return SearchResult(tuple(rows), single, scores, gram, sum(tried.looks[-1]))


def _unit(task: str, score: float, metric: str) -> float:
    """What scores of a task are divided by. Raises DeltaflError."""
    if metric == "absolute":
        return 1.0
    if score > 0:
        return score
    raise DeltaflError(
        f'task "{task}": its own model scores {score:g} on validation data, so scores cannot be '
        "normalised by it; use metric: absolute, or check model, head and data"
    )


_Model = tuple[str, float]
"""What tells the bits of a candidate: the digest of its update, and the float32 factor of that."""


class _Tried:
    """The rows tried so far, and the scores of their models, each of which is evaluated once.

    units: what scores of each task are divided by. total: rows at the end, for progress.
    """

    def __init__(
        self,
        problem: Problem,
        recipe: SearchRecipe,
        units: Sequence[float],
        total: int,
        on_progress: OnProgress,
    ) -> None:
        self.problem, self.recipe, self.units = problem, recipe, units
        self.total, self.on_progress = total, on_progress
        self.updates = UpdateCache(recipe.memory, problem.threads)
        self.rows, self.models = [BASE], list[_Model]([("", 0.0)])
        self.seen: dict[_Model, list[Tensor]] = {}
        sizes = [len(goal.val) for goal in problem.goals]
        self.looks, self.orders = [sizes], [torch.arange(size) for size in sizes]
        if recipe.strategy == "racing":
            self.looks, self.orders = looks(sizes), orders(sizes, recipe.seed or 0)

    def add(self, points: Sequence[Method]) -> None:
        """Add a row for each coefficient of each method. Lambda 0 is the base for any update."""
        total = self.problem.total_weight
        for method, params in points:
            rule = build_rule(method, params)
            update = self.updates.add(self.problem.aggregate(rule))
            averages = self.recipe.grid == "paper" and rule.traits.native_scale == "mean"
            for value in self.recipe.scaling_coefs:
                coef = value / total if averages else value
                factor = float(torch.tensor(coef * total, dtype=torch.float32))
                self.models.append((update, factor) if coef else self.models[0])
                self.rows.append(Row(method, params, coef, coef * total))

    def race(self, start: int) -> None:
        """Race the models of the rows from `start` on; with one look that is to evaluate them."""
        runners = list(dict.fromkeys(self.models[start:]))

        def judge(alive: Sequence[int], look: int) -> list[Tensor]:
            models, counts = [runners[i] for i in alive], self.looks[look]
            self.updates.keep({update for update, _ in models})
            for done, model in enumerate(sorted(models), 1):  # those of one update together
                self.evaluate(model, counts)
                self.tell(start + len(runners) - len(models) + done * (counts == self.looks[-1]))
            return [
                torch.stack([self.seen[m][t][:n] for m in models]) for t, n in enumerate(counts)
            ]

        race(judge, len(runners), self.looks, [1 / u for u in self.units], self.recipe.confidence)
        self.tell(len(self.rows))

    def tell(self, done: int) -> None:
        """Report how many rows are done."""
        self.on_progress(Progress("search on validation", done, self.total))

    def evaluate(self, model: _Model, counts: Sequence[int]) -> None:
        """Score a model on so many examples of each task, if another race has not done it."""
        seen = self.seen.get(model, [torch.empty(0)] * len(counts))
        if sum(map(len, seen)) < sum(counts):
            update, factor = model
            self.problem.load(self.updates.get(update) if update else None, factor)
            self.seen[model] = [
                torch.cat([scores, goal.val(goal.net, order[len(scores) : count])])
                for scores, goal, order, count in zip(
                    seen, self.problem.goals, self.orders, counts, strict=True
                )
            ]

    def results(self) -> tuple[list[Row], dict[str, dict[str, Tensor]]]:
        """The rows with what is known of their models; label -> task -> scores of all examples."""
        rows, first, all_scores = [], dict[_Model, Row](), {}
        counts = [sum(look) for look in self.looks]
        for row, model in zip(self.rows, self.models, strict=True):
            if same := first.get(model):
                known = {"val": same.val, "value": same.value, "dropped_at": same.dropped_at}
                rows.append(replace(row, same_as=same.label, **known))
                continue
            seen = self.seen[model]
            look = 1 + counts.index(sum(map(len, seen)))
            if is_exact := look == len(counts):
                seen = [s[order.argsort()] for s, order in zip(seen, self.orders, strict=True)]
            scores = {g.name: s for g, s in zip(self.problem.goals, seen, strict=True)}
            val = {name: float(s.double().mean()) for name, s in scores.items()}
            values = [mean / unit for mean, unit in zip(val.values(), self.units, strict=True)]
            first[model] = replace(
                row,
                val=val,
                value=sum(values) / len(values),
                evaluated=counts[look - 1],
                dropped_at=None if is_exact else look,
            )
            rows.append(first[model])
            if is_exact:
                all_scores[row.label] = scores
        return rows, all_scores
