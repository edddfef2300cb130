"""Choose method and coefficients on validation data, exhaustively or by racing; look at the test split once.

A candidate is (method, its parameters, lambda). Everything a search knows of tasks are per-example scores. The update
of a method is computed once and reused for every lambda; two updates with the same bits are one, whatever methods and
parameters they come from (most of a rho grid of FedGMA gives the same few updates).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deltafl.algebra.aggregate import Aggregate, Stepped, as_weights, sum_scale
from deltafl.algebra.deltas import Deltas
from deltafl.algebra.reductions import gram_matrix
from deltafl.algebra.tensors import Tensors
from deltafl.errors import DeltaflError, did_you_mean
from deltafl.merge.candidates import Held, Planned, Row, Shelf, check_methods, grid_of, planned
from deltafl.merge.race import Finish, check_confidence, race
from deltafl.merge.scores import (
    Goal,
    Judged,
    Metric,
    Problem,
    Scorer,
    Working,
    metric_value,
    single_scores,
)
from deltafl.merge.search_recipe import LAMBDAS
from deltafl.rules.rule import Rule

__all__ = [
    "STRATEGIES", "Goal", "Metric", "Problem", "Row", "Scorer", "SearchResult", "Working", "check_methods",
    "check_strategy", "curves", "grid_of", "metric_value", "search", "test_once", "test_singles",
]  # fmt: skip

STRATEGIES = ("exhaustive", "racing")


@dataclass(frozen=True)
class SearchResult:
    """Every row in the order tried, the best of all and of each method, and what they are measured against.

    single: task -> validation score of its own model. correct: label of a row that was evaluated on all validation
    data -> task -> scores (N,). The best of a method whose every row was dropped is the one that lasted longest.
    examples: examples that candidates were evaluated on; exhaustive_examples: those that an exhaustive search takes.
    """

    best: Row
    rows: tuple[Row, ...]
    best_of: Mapping[str, Row]
    base: Row
    single: Mapping[str, float]
    correct: Mapping[str, Mapping[str, Tensor]]
    norms: tuple[float, ...]
    gram: Tensor
    examples: int
    exhaustive_examples: int


def search(
    problem: Problem,
    methods: Sequence[tuple[str, Mapping[str, Any]]],
    *,
    lambdas: Sequence[float] = LAMBDAS,
    native_scale: bool = False,
    metric: Metric = "normalized",
    strategy: str = "exhaustive",
    confidence: float = 0.95,
    each_method: bool = False,
    seed: int = 0,
    memory: int = 8_000_000_000,
    on_row: Callable[[Row], None] = lambda row: None,
) -> SearchResult:
    """Evaluate the candidates on the validation data; the base (lambda 0) is one.

    native_scale: read the grid in each method's own convention (`grid: paper`): a rule whose paper averages has
    server_lr = value; otherwise the grid is lambda, on the sum, for all. metric "normalized": mean over tasks of
    score / score of the task's own model; "absolute": mean score. Of equal values the first row wins.

    strategy "exhaustive": every candidate on all validation data. "racing": see `deltafl.merge.race.race`, which
    `confidence` and `seed` (of the subsets) are for; rows that are dropped hold estimates and are not chosen.
    each_method: a candidate races only with those of its method, so that the best of every method is exact. memory:
    bytes of updates that a race holds; those above it are computed again at every look. on_row is told of a row as
    soon as it is known: in order, or, of a race, as it is dropped or has finished.

    Raises:
        DeltaflError: a method, parameter, strategy or confidence does not fit, or a single-task model scores 0 under
            "normalized".
    """
    check_strategy(strategy, confidence)
    check_methods(methods, lambdas, [u.source for u in problem.updates])
    weights = as_weights(problem.weights, len(problem.updates))
    gram = gram_matrix(Deltas(problem.updates, weights), problem.threads)
    norms = tuple(gram.diagonal().sqrt().tolist())
    single = single_scores(problem, metric)
    plan = planned(
        methods,
        lambdas,
        lambda rule: Aggregate(rule, problem.updates, weights, threads=problem.threads),
        norms,
        native_scale=native_scale,
        threads=problem.threads,
    )
    judged = Judged(problem, single, metric)
    if strategy == "racing":
        rows = _race(
            judged, plan, Shelf(memory, problem.threads), confidence, each_method, seed, on_row
        )
    else:
        rows = _exhaust(judged, plan, on_row)
    best_of = {m: max((r for r in rows if r.method == m), key=lambda r: r.rank) for m, _ in methods}
    best = max(rows, key=lambda r: r.rank)
    evaluated = [r.evaluated for r in rows if r.evaluated is not None]
    whole = len(evaluated) * sum(len(g.val) for g in problem.goals)
    return SearchResult(
        best,
        tuple(rows),
        best_of,
        rows[0],
        single,
        judged.correct,
        norms,
        gram,
        sum(evaluated),
        whole,
    )


def check_strategy(strategy: str, confidence: float) -> None:
    """Raise DeltaflError if there is no such strategy, or the confidence is not between 0 and 1."""
    if strategy not in STRATEGIES:
        raise DeltaflError(f'strategy: unknown "{strategy}"; {did_you_mean(strategy, STRATEGIES)}')
    check_confidence(confidence)


BASE = Row("base", {}, 0.0, 0.0)


def _exhaust(judged: Judged, plan: Iterable[Planned], on_row: Callable[[Row], None]) -> list[Row]:
    """Every row, evaluated on everything, in order."""
    ids = [torch.arange(len(g.val)) for g in judged.problem.goals]
    count = sum(map(len, ids))
    base = judged.row(BASE, Finish(tuple(judged.scores(BASE, None, ids)), count, None))
    rows, seen = [base], {}
    on_row(base)
    for row, bits, _, update in plan:
        twin = seen.get(bits) if row.scaling_coef else base
        if twin is None:
            row = seen[bits] = judged.row(
                row, Finish(tuple(judged.scores(row, update, ids)), count, None)
            )
        else:
            row = row.twin_of(twin)
        rows.append(row)
        on_row(row)
    return rows


def _race(
    judged: Judged,
    plan: Iterable[Planned],
    shelf: Shelf,
    confidence: float,
    each_method: bool,
    seed: int,
    on_row: Callable[[Row], None],
) -> list[Row]:
    """Every row, in order, of which those that lasted are evaluated on everything."""
    rows, runners, updates = [BASE], [0], dict[str, Held]()
    digest_of: dict[int, str] = {}
    first: dict[tuple[str, tuple[float, ...]], int] = {}
    twins: dict[int, list[int]] = {}
    contests: dict[str, set[int]] = {"base": {0}}
    for row, bits, aggregate, update in plan:
        at = len(rows)
        rows.append(row)
        twin = first.setdefault(bits, at) if row.scaling_coef else 0
        contests.setdefault(row.method, set()).add(
            runners.index(twin) if twin != at else len(runners)
        )
        if twin != at:
            twins.setdefault(twin, []).append(at)
            continue
        runners.append(at)
        digest_of[at] = bits[0]
        if bits[0] not in updates:
            updates[bits[0]] = shelf.put(aggregate, update, bits[0])

    def judge(alive: Sequence[int], ids: Sequence[Tensor]) -> Iterator[tuple[int, list[Tensor]]]:
        by_update: dict[str, list[int]] = {}
        for runner in alive:
            by_update.setdefault(digest_of.get(runners[runner], ""), []).append(runner)
        for digest, held in updates.items():
            if digest not in by_update:
                shelf.drop(held)
        for digest, members in by_update.items():
            update = shelf.get(updates[digest]) if digest else None
            for runner in members:
                yield runner, judged.scores(rows[runners[runner]], update, ids)

    def settle(runner: int, finish: Finish) -> None:
        at = runners[runner]
        rows[at] = judged.row(rows[at], finish)
        on_row(rows[at])
        for twin in twins.get(at, ()):
            rows[twin] = rows[twin].twin_of(rows[at])
            on_row(rows[twin])

    goals, single = judged.problem.goals, judged.single
    scale = [1 / single[g.name] if judged.metric == "normalized" else 1.0 for g in goals]
    sizes = [len(g.val) for g in goals]
    apart = [sorted(members) for members in contests.values()] if each_method else None
    race(
        judge,
        len(runners),
        sizes,
        scale,
        contests=apart,
        confidence=confidence,
        seed=seed,
        on_finish=settle,
    )
    return rows


def test_once(problem: Problem, row: Row, rule: Rule | None) -> dict[str, float]:
    """Test score per task of a chosen candidate (rule None: the base). Call it once per row that is reported."""
    tensors: Tensors = problem.base
    if rule is not None:
        weights = as_weights(problem.weights, len(problem.updates))
        aggregate = Aggregate(rule, problem.updates, weights, threads=problem.threads)
        tensors = dict(Stepped(problem.base, aggregate, sum_scale(weights, row.scaling_coef)))
    problem.model.load(tensors)
    return {
        g.name: float(g.test(problem.model, torch.arange(len(g.test))).double().mean())
        for g in problem.goals
    }


def test_singles(problem: Problem) -> dict[str, float]:
    """Test score of each task's own model."""
    scores = {}
    for goal in problem.goals:
        problem.model.load(goal.single)
        scores[goal.name] = float(
            goal.test(problem.model, torch.arange(len(goal.test))).double().mean()
        )
    return scores


def curves(result: SearchResult) -> Iterator[tuple[str, list[tuple[float, float]]]]:
    """For each method the best value at each lambda, over its other parameters; lambda 0 is the base."""
    for method in result.best_of:
        best: dict[float, float] = {0.0: result.base.value}
        for row in result.rows:
            if row.method == method:
                best[row.scaling_coef] = max(best.get(row.scaling_coef, row.value), row.value)
        yield method, sorted(best.items())
