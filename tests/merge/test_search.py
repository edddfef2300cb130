"""The search against a brute force of its own, on models that are a handful of numbers."""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from deltafl import Source, Update
from deltafl.algebra.tensors import Tensors
from deltafl.errors import DeltaflError
from deltafl.merge.candidates import Row, grid_of
from deltafl.merge.problem import Goal, Problem
from deltafl.merge.search import SearchResult, search
from deltafl.merge.search_recipe import LAMBDAS, SearchRecipe
from deltafl.progress import OnProgress, Progress, ignore
from laws.worlds import ByBlocks

ALL = (("task_arithmetic", {}), ("fednova", {}), ("fedgma", {}), ("median", {}), ("cclip", {}))
GRID = (0.1, 0.3, 0.5, 1.0)


Methods = Sequence[tuple[str, Mapping[str, Any]]]


def run(
    problem: Problem,
    methods: Methods = ALL,
    lambdas: Sequence[float] = GRID,
    on_progress: OnProgress = ignore,
    **settings: Any,
) -> SearchResult:
    """The search of a recipe whose files are not read."""
    recipe = SearchRecipe.of(
        base="base",
        models=[{"path": u.source.name, "data": "none"} for u in problem.updates],
        methods=[{"method": method, **params} for method, params in methods],
        scaling_coefs=lambdas,
        **settings,
    )
    return search(problem, recipe, on_progress)


@dataclass
class Loaded:
    """A model that is one vector; counts how often it is loaded."""

    w: Tensor = field(default_factory=lambda: torch.empty(0))
    seen: list[tuple[float, ...]] = field(default_factory=list)

    def load(self, tensors: Tensors) -> None:
        self.w = tensors["w"].clone()
        self.seen.append(tuple(self.w.tolist()))


@dataclass
class Near:
    """Per-example scores: 1 where the model is near the target, falling with the distance in one coordinate."""

    target: Tensor
    width: float = 1.0
    calls: int = 0

    def __len__(self) -> int:
        return len(self.target)

    def __call__(self, model: Loaded, ids: Tensor) -> Tensor:
        self.calls += 1
        return torch.exp(-(((model.w - self.target)[ids] / self.width) ** 2))


@dataclass
class Constant(Near):
    """The same score for whatever model."""

    score: float = 1.0

    def __call__(self, model: Loaded, ids: Tensor) -> Tensor:
        self.calls += 1
        return torch.full((len(ids),), self.score)


def make_problem(
    n: int = 3, seed: int = 0, steps: Sequence[int] | None = None, dims: int = 12
) -> Problem:
    draw = torch.Generator().manual_seed(seed)
    base = {"w": torch.randn(dims, generator=draw)}
    updates, goals, model = [], [], Loaded()
    for i in range(n):
        delta = (1 + i) * torch.randn(dims, generator=draw)
        source = Source(f"m{i}", num_steps=steps[i] if steps else 100 * (i + 1))
        updates.append(Update({"w": delta}, source))
        single = base["w"] + delta
        val, test = (Near(single + 0.3 * torch.randn(dims, generator=draw), 2.0) for _ in range(2))
        goals.append(Goal(f"task{i}", model, val, test, {"w": single}))
    return Problem(base, updates, goals)


def loaded(problem: Problem) -> Loaded:
    """The one model of all goals."""
    model = problem.goals[0].net
    assert isinstance(model, Loaded)
    return model


def val_calls(problem: Problem) -> list[int]:
    return [g.val.calls for g in problem.goals]  # type: ignore[attr-defined]


def test_calls(problem: Problem) -> list[int]:
    return [g.test.calls for g in problem.goals]  # type: ignore[attr-defined]


test_calls.__test__ = False  # type: ignore[attr-defined]


# An independent search: every rule by its formula, in float64, every candidate on its own


def rule_by_formula(
    method: str, params: Mapping[str, Any], deltas: Tensor, steps: Sequence[int]
) -> Tensor:
    n = len(deltas)
    if method == "task_arithmetic":
        return deltas.mean(0)
    if method == "fednova":
        mean = sum(steps) / n
        return sum(mean / (n * t) * d for t, d in zip(steps, deltas, strict=True))  # type: ignore[return-value]
    if method == "fedgma":
        agreement = deltas.sign().sum(0).abs() / n
        return torch.where(agreement >= params["rho"] - 1e-9, 1.0, agreement) * deltas.mean(0)
    if method == "median":
        ordered = deltas.sort(0).values
        return (ordered[(n - 1) // 2] + ordered[n // 2]) / 2
    assert method == "cclip"
    return (deltas * (params["rho"] / deltas.norm(dim=1, keepdim=True)).clamp_max(1)).mean(0)


def brute_force(
    problem: Problem, metric: str, lambdas: Sequence[float], paper: bool = False
) -> list[tuple[str, float]]:
    """(label without rho's digits, value) of each candidate of ALL."""
    deltas = torch.stack([u.delta["w"].double() for u in problem.updates])
    steps, base, n = (
        [u.source.num_steps or 0 for u in problem.updates],
        problem.base["w"].double(),
        len(deltas),
    )
    norms = deltas.norm(dim=1)
    rhos = {
        "fedgma": [i / 10 for i in range(1, 10)],
        "cclip": torch.linspace(
            float(norms.min()), float(norms.max()), 10, dtype=torch.float64
        ).tolist(),
    }

    def value(w: Tensor) -> float:
        total = 0.0
        for goal in problem.goals:
            val = goal.val
            assert isinstance(val, Near)
            scores = [
                math.exp(-(((float(x - t)) / val.width) ** 2))
                for x, t in zip(w, val.target, strict=True)
            ]
            own = [
                math.exp(-(((float(x - t)) / val.width) ** 2))
                for x, t in zip(goal.tuned["w"], val.target, strict=True)
            ]
            total += (
                (sum(scores) / sum(own)) if metric == "normalized" else sum(scores) / len(scores)
            )
        return total / n

    found = [("base", value(base))]
    for method, _ in ALL:
        for rho in rhos.get(method, [None]):
            update = rule_by_formula(method, {"rho": rho}, deltas, steps)
            for coef in lambdas:
                mean_scale = paper and method in ("fednova", "median")
                found.append((method, value(base + (coef if mean_scale else coef * n) * update)))
    return found


@pytest.mark.parametrize("metric", ["normalized", "absolute"])
@pytest.mark.parametrize("paper", [False, True])
@pytest.mark.parametrize("n", [2, 3, 5])
def test_every_row_is_that_of_a_brute_force(metric: Any, paper: bool, n: int) -> None:
    problem = make_problem(n, seed=n)
    found = run(problem, metric=metric, grid="paper" if paper else "default")
    wanted = brute_force(problem, metric, GRID, paper)
    assert [r.method for r in found.rows] == [m for m, _ in wanted]
    for row, (_, value) in zip(found.rows, wanted, strict=True):
        assert row.value == pytest.approx(value, abs=2e-6), row.label  # float32 against float64
    best = max(wanted, key=lambda w: w[1])
    assert found.best.value == pytest.approx(best[1], abs=2e-6)
    assert found.best.method == best[0] or found.best.value == pytest.approx(
        max(v for m, v in wanted if m == found.best.method), abs=2e-6
    )


def test_the_metric_decides_the_winner() -> None:
    # Task a's own model scores 0.1 and task b's 1: normalised, a point more in a counts ten times one in b.
    base, model = {"w": torch.zeros(1)}, Loaded()

    class Table(Near):
        def __init__(self, scores: Mapping[float, float]) -> None:
            super().__init__(torch.zeros(1))
            self.scores = scores

        def __call__(self, model: Loaded, ids: Tensor) -> Tensor:
            return torch.tensor([self.scores[round(model.w.item(), 3)]])

    a = Table({0.0: 0.0, 9.0: 0.1, 1.0: 0.1, 2.0: 0.05, 8.0: 0.0})
    b = Table({0.0: 0.0, 8.0: 1.0, 1.0: 0.5, 2.0: 0.9, 9.0: 0.0})
    goals = [
        Goal("a", model, a, a, {"w": torch.tensor([9.0])}),
        Goal("b", model, b, b, {"w": torch.tensor([8.0])}),
    ]
    problem = Problem(base, [Update({"w": torch.ones(1)}, Source("m"))], goals)
    found = {
        m: run(problem, [("task_arithmetic", {})], lambdas=[1.0, 2.0], metric=m)
        for m in ("normalized", "absolute")
    }
    assert found["normalized"].best.scaling_coef == 1.0  # (0.1 / 0.1 + 0.5 / 1) / 2 = 0.75 > 0.7
    assert found["absolute"].best.scaling_coef == 2.0  # (0.05 + 0.9) / 2 = 0.475 > 0.3


# The mistakes of methods.md section 4


def test_mistake_averaging_inside_the_task_loop_so_that_the_order_of_tasks_decides() -> None:
    problem = make_problem(3)
    wanted = run(problem)
    values = {r.label: r.value for r in wanted.rows}
    for order in itertools.permutations(range(3)):
        found = run(replace(problem, goals=[problem.goals[i] for i in order]))
        assert (found.best.method, found.best.params, found.best.scaling_coef) == (
            wanted.best.method, wanted.best.params, wanted.best.scaling_coef,
        )  # fmt: skip
        for row in found.rows:
            assert row.value == pytest.approx(values[row.label], rel=1e-12)


def test_mistake_normalising_validation_by_test_scores() -> None:
    problem = make_problem()
    goals = [replace(g, test=Constant(torch.zeros(5), score=1e-3)) for g in problem.goals]
    found, other = (run(replace(problem, goals=g)) for g in (problem.goals, goals))
    assert [r.value for r in found.rows] == [r.value for r in other.rows]
    model = Loaded()
    for goal in problem.goals:
        model.load(goal.tuned)
        assert found.single[goal.name] == float(goal.val(model, torch.arange(12)).double().mean())


def test_mistake_selecting_on_test_data() -> None:
    problem = make_problem()
    found = run(problem)
    assert test_calls(problem) == [0, 0, 0]
    problem.own_scores(test=True)
    assert test_calls(problem) == [1, 1, 1]
    problem.test_scores(found.base)
    assert test_calls(problem) == [2, 2, 2]


def test_mistake_candidates_applied_on_top_of_each_other() -> None:
    problem = make_problem()
    base = problem.base["w"].clone()
    together = {r.label: r for r in run(problem).rows}
    assert torch.equal(problem.base["w"], base)
    for method in ALL:
        for coef in GRID:
            alone = run(make_problem(), [method], lambdas=[coef]).rows[1:]
            for row in alone:
                assert row.val == together[row.label].val, row.label


def test_mistake_the_unclipped_end_is_never_searched() -> None:
    for seed in range(20):
        found = run(
            make_problem(seed=seed), [("task_arithmetic", {}), ("cclip", {})], lambdas=[0.3]
        )
        rhos = [r.params["rho"] for r in found.rows if r.method == "cclip"]
        assert (len(rhos), rhos[0], rhos[-1]) == (
            10,
            min(found.norms),
            pytest.approx(max(found.norms), rel=1e-11),
        )
        assert rhos[-1] >= max(found.norms)
        assert found.rows[-1].same_as == "task_arithmetic lambda=0.3"


def test_mistake_deltas_read_again_for_every_candidate() -> None:
    reads = []
    for lambdas in (GRID, LAMBDAS):
        problem = make_problem()
        deltas = [ByBlocks(u.delta) for u in problem.updates]
        updates = [Update(d, u.source) for d, u in zip(deltas, problem.updates, strict=True)]
        run(replace(problem, updates=updates), ALL, lambdas=lambdas)
        reads.append([d.reads for d in deltas])
    assert reads[0] == reads[1]
    assert min(reads[0]) > 0


# Each candidate once


def evaluated(found: SearchResult) -> list[Row]:
    return [r for r in found.rows if r.same_as is None]


def test_each_distinct_candidate_is_evaluated_once() -> None:
    problem = make_problem()
    found = run(problem)
    assert (
        val_calls(problem) == [len(evaluated(found)) + 1] * 3
    )  # + 1: a task's own model is scored on its task only
    model = loaded(problem)
    candidates = model.seen[len(problem.goals) :]
    assert len(candidates) == len(set(candidates)) == len(evaluated(found))
    assert len(found.rows) == 1 + (1 + 1 + 9 + 1 + 10) * len(GRID)


def test_levels_of_fedgma_that_give_one_update_are_one_candidate() -> None:
    found = run(make_problem(3), [("fedgma", {})], lambdas=[0.3])
    # |sum of three signs| is 1 or 3: up to rho = 1/3 nothing is softened, above it the coordinates of 1 are.
    assert [r.params["rho"] for r in evaluated(found)[1:]] == [0.1, 0.4]
    assert {r.same_as for r in found.rows[2:4]} == {"fedgma rho=0.1 lambda=0.3"}
    assert {r.same_as for r in found.rows[5:]} == {"fedgma rho=0.4 lambda=0.3"}
    values = {r.params["rho"]: r.value for r in found.rows[1:]}
    assert values[0.3] == values[0.1] != values[0.4] == values[0.9]


@pytest.mark.parametrize("n", range(2, 9))
def test_fednova_with_equal_steps_is_task_arithmetic(n: int) -> None:
    problem = make_problem(n, steps=[7] * n)
    found = run(problem, [("task_arithmetic", {}), ("fednova", {})])
    assert [r.same_as for r in found.rows if r.method == "fednova"] == [
        f"task_arithmetic lambda={c}" for c in GRID
    ]


def test_one_factor_written_in_two_ways_is_one_candidate() -> None:
    problem = make_problem(
        3, steps=[7] * 3
    )  # on the paper's grid fednova at 0.3 is task arithmetic at 0.3 / 3
    found = run(
        problem, [("task_arithmetic", {}), ("fednova", {})], lambdas=[0.1, 0.3], grid="paper"
    )
    assert found.rows[4].scaling_coef != 0.1
    assert found.rows[4].same_as == "task_arithmetic lambda=0.1"


def test_a_value_listed_twice_is_evaluated_once() -> None:
    found = run(make_problem(), [("fedgma", {"rho": [0.5, 0.5]})])
    assert (len(evaluated(found)), len(found.rows)) == (1 + len(GRID), 1 + 2 * len(GRID))


def test_scores_of_evaluated_rows_are_kept_under_labels_of_their_own() -> None:
    problem = make_problem(3)
    near = [1.0, 1.0 + 1e-9]  # alike in six digits
    found = run(problem, [("cclip", {"rho": near})])
    assert len({r.label for r in found.rows}) == len(found.rows)
    assert set(found.scores) == {r.label for r in evaluated(found)}
    for row in evaluated(found):
        for task, scores in found.scores[row.label].items():
            assert row.val[task] == float(scores.double().mean())


# The base, and ties


def test_the_base_is_a_candidate_and_wins_when_everything_else_is_worse() -> None:
    problem = make_problem()
    goals = [replace(g, val=Near(problem.base["w"], 3.0)) for g in problem.goals]
    found = run(replace(problem, goals=goals))
    assert found.best is found.base
    assert (found.best.method, found.best.scaling_coef, found.best.server_lr) == ("base", 0.0, 0.0)
    assert set(found.best_of) == {m for m, _ in ALL}


def test_coefficient_zero_of_a_method_is_the_base_and_is_not_evaluated_again() -> None:
    problem = make_problem()
    found = run(problem, [("median", {})], lambdas=[0.0, 0.3])
    assert found.rows[1].same_as == found.base.label
    assert found.rows[1].value == found.base.value
    assert len(evaluated(found)) == 2


def test_of_equal_values_the_first_row_wins() -> None:
    problem = make_problem()
    goals = [replace(g, val=Constant(torch.zeros(5))) for g in problem.goals]
    found = run(replace(problem, goals=goals))
    assert found.best is found.rows[0]
    for method, row in found.best_of.items():
        assert row is next(r for r in found.rows if r.method == method)


def test_a_value_that_is_not_a_number_never_wins() -> None:
    class Overflowing(Near):
        def __call__(self, model: Loaded, ids: Tensor) -> Tensor:
            return torch.where(model.w.norm() < 5, torch.nan, super().__call__(model, ids))

    problem = make_problem(2)
    small = float(problem.base["w"].norm())
    assert small < 5
    goals = [replace(g, val=Overflowing(problem.goals[0].tuned["w"], 9.0)) for g in problem.goals]
    found = run(
        replace(problem, goals=goals),
        [("task_arithmetic", {})],
        lambdas=[0.01, 1.5],
        metric="absolute",
    )
    assert [math.isnan(r.value) for r in found.rows] == [True, True, False]
    assert found.best is found.rows[2]
    assert found.best_of["task_arithmetic"] is found.rows[2]


# Grids and scales


def test_the_default_grid_is_that_of_the_paper() -> None:
    assert len(LAMBDAS) == 40
    assert pytest.approx([0.05 * i for i in range(1, 41)]) == LAMBDAS
    found = run(make_problem(), [("task_arithmetic", {})], LAMBDAS)
    assert [r.scaling_coef for r in found.rows[1:]] == list(LAMBDAS)


def test_rho_of_fedgma_is_from_a_tenth_to_nine_tenths() -> None:
    rhos = [p["rho"] for p in grid_of("fedgma", {}, (1.0, 2.0))]
    assert rhos == [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]


def test_a_given_parameter_takes_the_place_of_its_grid_and_lists_are_crossed() -> None:
    assert grid_of("fedgma", {"rho": 0.3}, (1.0, 2.0)) == [{"rho": 0.3}]
    given = {"inner": "ties", "drop_rate": [0.5, 0.9], "density": [0.1, 0.2]}
    assert len(grid_of("dare", given, (1.0, 2.0))) == 4
    assert grid_of("cclip", {"unit": "quantile", "rho": [0.5, 1.0]}, (1.0, 2.0)) == [
        {"unit": "quantile", "rho": 0.5}, {"unit": "quantile", "rho": 1.0},
    ]  # fmt: skip


@pytest.mark.parametrize("paper", [False, True])
def test_the_papers_grid_is_a_mean_for_fednova_and_median_and_a_sum_for_the_others(
    paper: bool,
) -> None:
    found = run(make_problem(4), ALL, lambdas=[0.6], grid="paper" if paper else "default")
    for row in found.rows[1:]:
        mean = paper and row.method in ("fednova", "median")
        assert row.server_lr == pytest.approx(0.6 if mean else 0.6 * 4), row.label
        assert row.server_lr == pytest.approx(row.scaling_coef * 4)


def test_weights_change_the_scale_and_the_rules() -> None:
    problem = replace(make_problem(2), weights=(1.0, 3.0))
    found = run(problem, [("task_arithmetic", {})], lambdas=[0.2])
    model = loaded(problem)
    a, b = (u.delta["w"] for u in problem.updates)
    torch.testing.assert_close(torch.tensor(model.seen[-1]), problem.base["w"] + 0.2 * a + 0.6 * b)
    assert found.rows[1].server_lr == pytest.approx(0.8)


# What is kept


@pytest.mark.parametrize(
    "settings", [{}, {"strategy": "racing"}, {"strategy": "racing", "each_method": True}]
)
def test_progress_never_falls_and_ends_with_every_row(settings: Mapping[str, Any]) -> None:
    told: list[Progress] = []
    found = run(make_problem(), on_progress=told.append, **settings)
    done = [p.done for p in told]
    assert done == sorted(done)
    assert done[-1] == len(found.rows)
    assert {p.total for p in told} == {len(found.rows)}


def test_curves_hold_the_best_value_at_each_coefficient() -> None:
    found = run(make_problem())
    for method, curve in found.curves.items():
        assert [x for x, _ in curve] == [0.0, *GRID]
        assert curve[0][1] == found.base.value
        for coef, value in curve[1:]:
            assert value == max(
                r.value for r in found.rows if (r.method, r.scaling_coef) == (method, coef)
            )


def test_norms_and_cosines_are_those_of_the_deltas() -> None:
    problem = make_problem()
    found = run(problem, [("median", {})], lambdas=[0.1])
    deltas = torch.stack([u.delta["w"].double() for u in problem.updates])
    torch.testing.assert_close(found.gram, deltas @ deltas.T)
    assert found.norms == pytest.approx(deltas.norm(dim=1).tolist())


@pytest.mark.parametrize("method", [m for m, _ in ALL])
def test_the_test_score_is_that_of_the_chosen_candidate(method: str) -> None:
    problem = make_problem()
    found = run(problem)
    row = found.best_of[method]
    # On validation data the same call gives the row's own scores, bit for bit.
    swapped = replace(problem, goals=[replace(g, test=g.val) for g in problem.goals])
    assert swapped.test_scores(row) == row.val
    assert swapped.test_scores(found.base) == found.base.val
    assert swapped.own_scores(test=True) == found.single


def test_log_likelihoods_can_be_searched_on_as_absolute_scores() -> None:
    @dataclass
    class LogLikelihood(Near):
        def __call__(self, model: Loaded, ids: Tensor) -> Tensor:
            return -((model.w - self.target)[ids].double() ** 2)

    problem = make_problem()
    goals = [replace(g, val=LogLikelihood(g.val.target)) for g in problem.goals]  # type: ignore[attr-defined]
    problem = replace(problem, goals=goals)
    found = run(problem, [("task_arithmetic", {})], metric="absolute")
    total = sum(u.delta["w"].double() for u in problem.updates)
    for row in found.rows:
        w = problem.base["w"].double() + row.scaling_coef * total
        wanted = -sum(float(((w - g.val.target) ** 2).mean()) for g in goals) / 3  # type: ignore[attr-defined]
        assert row.value == pytest.approx(wanted, rel=1e-5)
    with pytest.raises(DeltaflError, match="use metric: absolute"):
        run(problem, [("task_arithmetic", {})])


# What is refused, before anything is evaluated


@pytest.mark.parametrize("score", [0.0, math.nan])
def test_a_single_task_score_of_zero_is_an_error_that_names_the_task(score: float) -> None:
    problem = make_problem()
    goals = [
        *problem.goals[:2],
        replace(problem.goals[2], val=Constant(torch.zeros(4), score=score)),
    ]
    problem = replace(problem, goals=goals)
    with pytest.raises(
        DeltaflError, match=r'task "task2": its own model scores .* metric: absolute'
    ):
        run(problem)
    run(problem, ALL, lambdas=[0.3], metric="absolute")


REFUSED: dict[str, tuple[tuple[str, Mapping[str, Any]], str]] = {
    "method": (("fedgm", {}), 'unknown method "fedgm"; did you mean "fedgma"?'),
    "parameter": (("median", {"rho": 0.5}), 'median has no parameter "rho"'),
    "range": (("fedgma", {"rho": [0.5, 1.5]}), "rho is 1.5"),
    "empty": (("fedgma", {"rho": []}), "rho is an empty list"),
    "krum": (("krum", {"num_byzantine": 2}), "krum"),
    "twice": (("task_arithmetic", {}), "task_arithmetic is named twice"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_searched_is_an_error_before_anything_is_evaluated(case: str) -> None:
    method, message = REFUSED[case]
    problem = make_problem()
    with pytest.raises(DeltaflError) as error:
        run(problem, [("task_arithmetic", {}), method, ("median", {"middle": "lower"})])
    assert message in str(error.value)
    assert val_calls(problem) == [0, 0, 0]


def test_fednova_without_steps_is_an_error_before_anything_is_evaluated() -> None:
    problem = make_problem()
    unknown = [Update(u.delta, Source(u.source.name)) for u in problem.updates[1:]]
    problem = replace(problem, updates=[problem.updates[0], *unknown])
    with pytest.raises(DeltaflError) as error:
        run(problem)
    assert [name in str(error.value) for name in ('"m0"', '"m1"', '"m2"')] == [False, True, True]
    assert val_calls(problem) == [0, 0, 0]


def test_every_reason_is_given_at_once() -> None:
    with pytest.raises(DeltaflError) as error:
        run(make_problem(), [("fedgm", {}), ("median", {"rho": 1.0})])
    assert len(error.value.problems) == 2
