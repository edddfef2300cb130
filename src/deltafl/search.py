"""Choose method and coefficients on validation data, exhaustively; look at the test split once.

A candidate is (method, its parameters, lambda). Everything a search knows of tasks are per-example scores. The update
of a method is computed once and reused for every lambda; two updates with the same bits are one, whatever methods and
parameters they come from (most of a rho grid of FedGMA gives the same few updates).
"""

import hashlib
import itertools
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from deltafl.aggregation import Aggregate, Rows, Stepped, Update, Weights, WeightsLike, as_weights, sum_scale
from deltafl.errors import DeltaflError
from deltafl.reductions import gram_matrix
from deltafl.rules import Rule, Source, build_rule, check_rule
from deltafl.streaming import chunks, in_order
from deltafl.tensors import Tensors, shape_of

logger = logging.getLogger(__name__)

LAMBDAS = tuple(round(0.05 * i, 2) for i in range(1, 41))
"""The grid of arXiv 2411.18607."""

RHOS = tuple(round(0.1 * i, 1) for i in range(1, 10))
NORM_LEVELS = 10

Metric = Literal["normalized", "absolute"]


class Working(Protocol):
    """A model in memory that takes other weights and that scorers judge."""

    def load(self, tensors: Tensors) -> object: ...


class Scorer(Protocol):
    """`(model, ids) -> per-example scores`; see `deltafl.training.Scorer`."""

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
class Row:
    """One candidate: its scale in both conventions, mean score per task on validation, and the metric's value.

    same_as: an earlier row whose model has the same bits, so that it was not evaluated again.
    """

    method: str
    params: Mapping[str, Any]
    scaling_coef: float
    server_lr: float
    val: Mapping[str, float] = field(default_factory=dict)
    value: float = 0.0
    same_as: str | None = None

    @property
    def label(self) -> str:
        """`fedgma rho=0.6 lambda=0.3`, in full precision: no other candidate has it."""
        return " ".join([self.method, *(f"{k}={v}" for k, v in self.params.items()), f"lambda={self.scaling_coef}"])


@dataclass(frozen=True)
class SearchResult:
    """Every row in the order tried, the best of all and of each method, and what they are measured against.

    single: task -> validation score of its own model. correct: label of an evaluated row -> task -> scores (N,).
    """

    best: Row
    rows: tuple[Row, ...]
    best_of: Mapping[str, Row]
    base: Row
    single: Mapping[str, float]
    correct: Mapping[str, Mapping[str, Tensor]]
    norms: tuple[float, ...]
    gram: Tensor


def grid_of(method: str, params: Mapping[str, Any], norms: Sequence[float]) -> list[dict[str, Any]]:
    """All combinations of a method's parameters: a list is a grid; rho has the paper's grid where it is not given.

    fedgma: 0.1 .. 0.9; cclip: `NORM_LEVELS` values from the smallest to the largest norm, both included: the largest
    clips nothing. Raises DeltaflError if a list is empty.
    """
    given = dict(params)
    if method == "fedgma":
        given.setdefault("rho", list(RHOS))
    if method == "cclip" and given.get("unit", "absolute") == "absolute":
        low, high = min(norms), max(norms)
        levels = [low + (high - low) * i / (NORM_LEVELS - 1) for i in range(NORM_LEVELS - 1)]
        given.setdefault("rho", [*levels, high * (1 + 1e-12)])  # rounding must not clip the longest delta
    for key, value in given.items():
        if value == []:
            raise DeltaflError(f"methods: {method}: {key} is an empty list; name at least one value")
    axes = [[(k, v) for v in (value if isinstance(value, list) else [value])] for k, value in given.items()]
    return [dict(point) for point in itertools.product(*axes)]


def check_methods(
    methods: Sequence[tuple[str, Mapping[str, Any]]], lambdas: Sequence[float], sources: Sequence[Source]
) -> None:
    """Raise DeltaflError with every reason why these methods and coefficients cannot be searched with these models."""
    problems = [f"scaling_coefs: {value} is not a finite number" for value in lambdas if not math.isfinite(value)]
    names = [method for method, _ in methods]
    twice = sorted({name for name in names if names.count(name) > 1})
    problems += [f"methods: {name} is named twice; give one entry, whose parameters are lists" for name in twice]
    for method, params in methods:
        try:
            for point in grid_of(method, params, (1.0, 1.0)):
                check_rule(build_rule(method, point), sources)
        except DeltaflError as error:
            problems += [p for p in error.problems if p not in problems]
    if problems:
        raise DeltaflError(*problems)


def search(
    problem: Problem,
    methods: Sequence[tuple[str, Mapping[str, Any]]],
    *,
    lambdas: Sequence[float] = LAMBDAS,
    native_scale: bool = False,
    metric: Metric = "normalized",
    on_row: Callable[[Row], None] = lambda row: None,
) -> SearchResult:
    """Evaluate every candidate on the validation data; the base (lambda 0) is one.

    native_scale: read the grid in each method's own convention (`grid: paper`): a rule whose paper averages has
    server_lr = value; otherwise the grid is lambda, on the sum, for all. metric "normalized": mean over tasks of
    score / score of the task's own model; "absolute": mean score. Of equal values the first row wins.

    Raises:
        DeltaflError: a method or parameter does not fit, or a single-task model scores 0 under "normalized".
    """
    check_methods(methods, lambdas, [u.source for u in problem.updates])
    weights = as_weights(problem.weights, len(problem.updates))
    gram = gram_matrix(Rows(problem.updates, weights), problem.threads)
    norms = tuple(gram.diagonal().sqrt().tolist())
    plan = [(m, point, build_rule(m, point)) for m, params in methods for point in grid_of(m, params, norms)]
    total = sum(map(abs, weights.default))
    single = _single_scores(problem, metric)
    correct: dict[str, dict[str, Tensor]] = {}

    def judge(row: Row, tensors: Tensors) -> Row:
        problem.model.load(tensors)
        scores = {g.name: g.val(problem.model, torch.arange(len(g.val))) for g in problem.goals}
        correct[row.label] = scores
        val = {name: float(s.double().mean()) for name, s in scores.items()}
        return replace(row, val=val, value=metric_value(val, single, metric))

    base = judge(Row("base", {}, 0.0, 0.0), problem.base)
    rows = [base]
    on_row(base)
    seen: dict[tuple[str, tuple[float, ...]], Row] = {}
    for method, point, rule in plan:
        update, digest = materialize(
            Aggregate(rule, problem.updates, weights, threads=problem.threads), problem.threads
        )
        for value in lambdas:
            coef = value / total if native_scale and rule.traits.native_scale == "mean" else value
            row = Row(method, point, coef, coef * total)
            bits = (digest, _factors(weights, coef))
            twin = seen.get(bits) if coef else base
            if twin is None:
                stepped = Stepped(problem.base, update, sum_scale(weights, coef))
                row = judge(row, dict(stepped))
                seen[bits] = row
            else:
                row = replace(row, val=twin.val, value=twin.value, same_as=twin.label)
            rows.append(row)
            on_row(row)
    best_of = {m: max((r for r in rows if r.method == m), key=_rank) for m, _ in methods}
    best = max(rows, key=_rank)
    return SearchResult(best, tuple(rows), best_of, base, single, correct, norms, gram)


def _rank(row: Row) -> float:
    """The value; NaN (a model that overflows) is worse than anything."""
    return -math.inf if math.isnan(row.value) else row.value


def _factors(weights: Weights, scaling_coef: float) -> tuple[float, ...]:
    """The float32 factors that a coefficient stands for: where they are equal, one update gives one model."""
    totals = [sum(map(abs, row)) for row in (weights.default, *(row for _, row in weights.patterns))]
    return tuple(torch.tensor([scaling_coef * total for total in totals], dtype=torch.float32).tolist())


def _single_scores(problem: Problem, metric: Metric) -> dict[str, float]:
    """Validation score of each task's own model, measured once."""
    single = {}
    for goal in problem.goals:
        problem.model.load(goal.single)
        single[goal.name] = float(goal.val(problem.model, torch.arange(len(goal.val))).double().mean())
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


def materialize(aggregate: Aggregate, threads: int) -> tuple[dict[str, Tensor], str]:
    """The update as tensors in memory, float32, and a digest of its bits."""
    tensors = {n: torch.empty(shape_of(aggregate, n)) for n in aggregate}
    flat = {n: t.reshape(-1) for n, t in tensors.items()}

    def fill(group: list[tuple[str, int, int]]) -> None:
        for name, start, stop in group:
            flat[name][start:stop] = aggregate.block(name, start, stop)

    for _ in in_order(fill, list(chunks([(n, t.numel()) for n, t in flat.items()])), threads):
        pass
    digest = hashlib.sha256()
    for tensor in flat.values():
        digest.update((tensor + 0.0).numpy())  # type: ignore[arg-type]  # + 0.0: -0 is 0
    return tensors, digest.hexdigest()


def test_once(problem: Problem, row: Row, rule: Rule | None) -> dict[str, float]:
    """Test score per task of a chosen candidate (rule None: the base). Call it once per row that is reported."""
    tensors: Tensors = problem.base
    if rule is not None:
        weights = as_weights(problem.weights, len(problem.updates))
        aggregate = Aggregate(rule, problem.updates, weights, threads=problem.threads)
        tensors = dict(Stepped(problem.base, aggregate, sum_scale(weights, row.scaling_coef)))
    problem.model.load(tensors)
    return {g.name: float(g.test(problem.model, torch.arange(len(g.test))).double().mean()) for g in problem.goals}


def test_singles(problem: Problem) -> dict[str, float]:
    """Test score of each task's own model."""
    scores = {}
    for goal in problem.goals:
        problem.model.load(goal.single)
        scores[goal.name] = float(goal.test(problem.model, torch.arange(len(goal.test))).double().mean())
    return scores


def curves(result: SearchResult) -> Iterator[tuple[str, list[tuple[float, float]]]]:
    """For each method the best value at each lambda, over its other parameters; lambda 0 is the base."""
    for method in result.best_of:
        best: dict[float, float] = {0.0: result.base.value}
        for row in result.rows:
            if row.method == method:
                best[row.scaling_coef] = max(best.get(row.scaling_coef, row.value), row.value)
        yield method, sorted(best.items())
