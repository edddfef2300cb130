"""The search against a brute force of its own, on models that are a handful of numbers."""

import copy
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from checkpoint_files import fails
from deltafl import Source, Update
from deltafl.algebra.aggregate import Aggregate
from deltafl.algebra.deltas import CachedBlocks
from deltafl.algebra.tensors import Tensors
from deltafl.errors import DeltaflError
from deltafl.merge.candidates import Row, check_methods, grid_of
from deltafl.merge.inputs import Opened
from deltafl.merge.problem import Goal, Problem
from deltafl.merge.search import SearchResult, search
from deltafl.merge.search_recipe import LAMBDAS, SearchRecipe
from deltafl.merge.updates import UpdateCache
from deltafl.models import Net
from deltafl.progress import Progress
from deltafl.rules.building import build_rule
from deltafl.rules.iso import IsoC
from deltafl.rules.weights import as_weights
from deltafl.tasks import ImageInput, Task

ALL = (("task_arithmetic", {}), ("fednova", {}), ("fedgma", {}), ("median", {}), ("cclip", {}))
GRID = (0.1, 0.3, 0.5, 1.0)


class Vector(Net):
    """A model that is one vector; remembers what was loaded."""

    def __init__(self, dims: int) -> None:
        module = nn.Module()
        module.w = nn.Parameter(torch.empty(dims))
        super().__init__(module, ImageInput(8, 1, (0.5,), (0.5,)))
        self.seen: list[tuple[float, ...]] = []

    def load(self, tensors: Tensors) -> tuple[str, ...]:
        self.seen.append(tuple(tensors["w"].tolist()))
        return super().load(tensors)


class Near(Task):
    """Scores fall with the distance of a coordinate from its target; batches are counted."""

    ratio_scaled = True

    def __init__(
        self, name: str, val: Tensor, test: Tensor, width: float = 2.0, constant: bool = False
    ) -> None:
        self.name, self.width, self.constant = name, width, constant
        self.targets, self.asked = {"val": val, "test": test}, Counter[str]()

    def size(self, split: str) -> int:
        return len(self.targets[split])

    def batch(self, split: str, ids: Tensor, *_: Any) -> dict[str, Tensor]:
        self.asked[split] += 1
        return {"ids": ids, "target": self.targets[split][ids]}

    def score(self, model: Vector, batch: Mapping[str, Tensor]) -> Tensor:
        distance = model.module.w[batch["ids"] % 12] - batch["target"]
        return torch.full_like(distance, self.width) if self.constant else self.scored(distance)

    def scored(self, distance: Tensor) -> Tensor:
        return torch.exp(-((distance / self.width) ** 2))

    def loss(self, model: Any, batch: Any) -> Any:
        raise AssertionError("nothing trains")

    def fingerprint(self) -> str:
        return ""


class Answers(Near):
    """Right for the examples whose own patience is above the model's distance from the target."""

    def size(self, split: str) -> int:
        return 500

    def batch(self, split: str, ids: Tensor, *_: Any) -> dict[str, Tensor]:
        return {"ids": ids}

    def score(self, model: Vector, batch: Mapping[str, Tensor]) -> Tensor:
        target = self.targets["val"]
        likely = torch.exp(-((model.module.w - target) ** 2).mean() / 9)
        draw = torch.Generator().manual_seed(int(target.abs().sum() * 1e4))
        return (torch.rand(500, generator=draw)[batch["ids"]] < likely).float()


def make_problem(
    n: int = 3,
    seed: int = 0,
    steps: Sequence[int] | None = None,
    kind: type[Near] = Near,
    scratch: Path = Path("none"),
) -> Problem:
    draw = torch.Generator().manual_seed(seed)
    base, net = {"w": torch.randn(12, generator=draw)}, Vector(12)
    updates, goals = [], []
    for i in range(n):
        delta = (1 + i) * torch.randn(12, generator=draw)
        source = Source(f"m{i}", num_steps=steps[i] if steps else 100 * (i + 1))
        updates.append(Update({"w": delta}, source))
        own = base["w"] + delta
        val, test = (own + 0.3 * torch.randn(12, generator=draw) for _ in range(2))
        goals.append(Goal(kind(f"task{i}", val, test), net, {"w": own}))
    return Problem(Opened(CachedBlocks(base), updates, as_weights(None, n), {}), goals, scratch)


def with_tasks(problem: Problem, *tasks: Near) -> Problem:
    """The problem with other tasks, the last of them for all that follow."""
    goals = []
    for i, goal in enumerate(problem.goals):
        task = copy.copy(tasks[min(i, len(tasks) - 1)])
        task.name = f"task{i}"
        goals.append(replace(goal, task=task))
    return replace(problem, goals=goals)


def recipe_of(
    methods: Sequence[tuple[str, Mapping[str, Any]]] = ALL,
    lambdas: Sequence[float] = GRID,
    **settings: Any,
) -> SearchRecipe:
    return SearchRecipe.of(
        base="base",
        models=[{"path": "m", "data": "none"}],
        methods=[{"method": method, **params} for method, params in methods],
        scaling_coefs=lambdas,
        **settings,
    )


def run(problem: Problem, *methods_and_lambdas: Any, **settings: Any) -> SearchResult:
    """The search of a recipe whose files are not read; progress never falls, and ends with every row."""
    told: list[Progress] = []
    found = search(problem, recipe_of(*methods_and_lambdas, **settings), told.append)
    done = [p.done for p in told]
    assert done == sorted(done)
    assert (done[-1], {p.total for p in told}) == (len(found.rows), {len(found.rows)})
    return found


def evaluated(found: SearchResult) -> list[Row]:
    return [r for r in found.rows if r.same_as is None]


# An independent search: every rule by its formula, in float64, every candidate on its own


def rule_by_formula(method: str, rho: float, deltas: Tensor, steps: Sequence[int]) -> Tensor:
    n = len(deltas)
    if method == "fednova":
        return sum(sum(steps) / n / (n * t) * d for t, d in zip(steps, deltas, strict=True))  # type: ignore[return-value]
    if method == "fedgma":
        agreement = deltas.sign().sum(0).abs() / n
        return torch.where(agreement >= rho - 1e-9, 1.0, agreement) * deltas.mean(0)
    if method == "median":
        ordered = deltas.sort(0).values
        return (ordered[(n - 1) // 2] + ordered[n // 2]) / 2
    if method == "cclip":
        return (deltas * (rho / deltas.norm(dim=1, keepdim=True)).clamp_max(1)).mean(0)
    return deltas.mean(0)


def brute_force(problem: Problem, metric: str, paper: bool) -> list[tuple[str, float, float]]:
    """(method, server_lr, value) of each candidate of ALL."""
    deltas = torch.stack([u.delta["w"].double() for u in problem.opened.updates])
    steps = [u.source.num_steps or 0 for u in problem.opened.updates]
    base, n, norms = problem.opened.base["w"].double(), len(deltas), deltas.norm(dim=1)
    clips = torch.linspace(*norms.aminmax(), 10, dtype=torch.float64).tolist()
    rhos = {"fedgma": [i / 10 for i in range(1, 10)], "cclip": clips}

    def score(w: Tensor, goal: Goal) -> float:
        target = goal.task.targets["val"].double()  # type: ignore[attr-defined]
        return float(torch.exp(-(((w - target) / 2) ** 2)).mean())

    def value(w: Tensor) -> float:
        own = [score(g.tuned["w"], g) if metric == "normalized" else 1.0 for g in problem.goals]
        return sum(score(w, g) / o for g, o in zip(problem.goals, own, strict=True)) / n

    found = [("base", 0.0, value(base))]
    for method, _ in ALL:
        for rho in rhos.get(method, [0.0]):
            update = rule_by_formula(method, rho, deltas, steps)
            for coef in GRID:
                lr = coef if paper and method in ("fednova", "median") else coef * n
                found.append((method, lr, value(base + lr * update)))
    return found


@pytest.mark.parametrize("metric", ["normalized", "absolute"])
@pytest.mark.parametrize("paper", [False, True])
@pytest.mark.parametrize("n", [2, 3, 5])
def test_every_row_is_that_of_a_brute_force(metric: Any, paper: bool, n: int) -> None:
    problem = make_problem(n, seed=n)
    found = run(problem, metric=metric, grid="paper" if paper else "default")
    wanted = brute_force(problem, metric, paper)
    assert [r.method for r in found.rows] == [m for m, _, _ in wanted]
    for row, (_, server_lr, value) in zip(found.rows, wanted, strict=True):
        assert row.value == pytest.approx(value, abs=2e-6), row.label  # float32 against float64
        assert row.server_lr == pytest.approx(server_lr) == pytest.approx(row.scaling_coef * n)
    assert found.best.value == pytest.approx(max(v for _, _, v in wanted), abs=2e-6)
    for method, row in found.best_of.items():
        mine = [r for r in found.rows if r.method == method]
        assert row is max(mine, key=lambda r: r.value)
        start, *curve = found.curves[method]
        assert start == [0.0, found.base.value]
        assert [x for x, _ in curve] == sorted({r.scaling_coef for r in mine})
        for coef, best in curve:
            assert best == max(r.value for r in mine if r.scaling_coef == coef)
    deltas = torch.stack([u.delta["w"].double() for u in problem.opened.updates])
    torch.testing.assert_close(found.gram, deltas @ deltas.T)


def test_test_data_are_looked_at_once_for_each_reported_row() -> None:
    problem = make_problem()
    found, tasks = run(problem), [goal.task for goal in problem.goals]
    assert [task.asked["test"] for task in tasks] == [0] * 3  # type: ignore[attr-defined]
    targets = [task.targets["val"] for task in tasks]  # type: ignore[attr-defined]
    # on validation data the same call gives the row's own scores, bit for bit
    swapped = with_tasks(problem, *(Near("t", target, target) for target in targets))
    assert swapped.own_scores("test") == found.single
    for count, row in enumerate([found.base, *found.best_of.values()], 1):
        problem.scores(row, "test")
        assert [task.asked["test"] for task in tasks] == [count] * 3  # type: ignore[attr-defined]
        assert swapped.scores(row, "val") == row.val


def test_each_distinct_candidate_is_evaluated_once() -> None:
    problem = make_problem()
    found = run(problem)
    for goal in problem.goals:  # + 1: a task's own model is scored on its task only
        assert goal.task.asked["val"] == len(evaluated(found)) + 1  # type: ignore[attr-defined]
    loaded = problem.goals[0].net.seen[len(problem.goals) :]  # type: ignore[attr-defined]
    assert len(loaded) == len(set(loaded)) == len(evaluated(found))
    assert len({r.label for r in found.rows}) == len(found.rows) == 1 + 22 * len(GRID)
    assert set(found.scores) == {r.label for r in evaluated(found)}
    for row in evaluated(found):
        for task, scores in found.scores[row.label].items():
            assert row.val[task] == float(scores.double().mean())


NOVA = (("task_arithmetic", {}), ("fednova", {}))


@pytest.mark.parametrize(
    ("methods", "settings", "same"),
    [
        # |sum of three signs| is 1 or 3: up to rho = 1/3 nothing is softened, above it those of 1 are
        ([("fedgma", {})], {}, {i: 1 if i < 4 else 4 for i in (2, 3, 5, 6, 7, 8, 9)}),
        ([("fedgma", {"rho": [0.5, 0.5]})], {}, {2: 1}),
        (NOVA, {}, {2: 1}),  # of equal steps
        # on the paper's grid fednova at 0.3 is task arithmetic at 0.3 / 3
        (NOVA, {"grid": "paper", "scaling_coefs": [0.1, 0.3]}, {4: 1}),
        ([("cclip", {"rho": [1.0, 1.0 + 1e-9]})], {}, {2: 1}),  # alike in float32
        ([("task_arithmetic", {}), ("cclip", {"unit": "quantile", "rho": 1.0})], {}, {2: 1}),
        ([("median", {})], {"scaling_coefs": [0.0, 0.3]}, {1: 0}),
    ],
)  # fmt: skip
def test_candidates_with_the_same_bits_are_one(methods, settings, same):
    problem = make_problem(3, steps=[7] * 3)
    found = search(problem, recipe_of(methods, [0.3]).replace(**settings))
    labels = [row.label for row in found.rows]
    assert {labels[i]: row.same_as for i, row in enumerate(found.rows) if row.same_as} == {
        labels[i]: labels[j] for i, j in same.items()
    }
    for i, j in same.items():
        assert found.rows[i].value == found.rows[j].value


@pytest.mark.parametrize("strategy", ["exhaustive", "racing"])
def test_the_base_wins_where_all_else_is_worse_and_of_equal_values_the_first(strategy: Any) -> None:
    problem = make_problem()
    w = problem.opened.base["w"]
    for task in (Near("t", w, w, 0.3), Near("t", w, w, constant=True)):
        found = run(with_tasks(problem, task), ALL, strategy=strategy)
        assert found.best is found.base is found.rows[0]
        assert (found.best.method, found.best.server_lr) == ("base", 0.0)
    for method, row in found.best_of.items():
        assert row is next(r for r in found.rows if r.method == method)


def test_a_value_that_is_not_a_number_never_wins() -> None:
    class Overflowing(Near):
        def score(self, model: Vector, batch: Mapping[str, Tensor]) -> Tensor:
            return super().score(model, batch) * (math.nan if model.module.w.norm() < 5 else 1)

    problem = make_problem(2)
    assert problem.opened.base["w"].norm() < 5
    own = problem.goals[0].tuned["w"]
    problem = with_tasks(problem, Overflowing("t", own, own, 9.0))
    found = run(problem, [("task_arithmetic", {})], [0.01, 1.5], metric="absolute")
    assert [math.isnan(r.value) for r in found.rows] == [True, True, False]
    assert found.best is found.best_of["task_arithmetic"] is found.rows[2]


def test_a_given_parameter_takes_the_place_of_its_grid_and_lists_are_crossed() -> None:
    assert [p["rho"] for p in grid_of("fedgma", {}, (1.0, 2.0))] == [i / 10 for i in range(1, 10)]
    assert grid_of("fedgma", {"rho": 0.3}, (1.0, 2.0)) == [{"rho": 0.3}]
    given = {"inner": "ties", "drop_rate": [0.5, 0.9], "density": [0.1, 0.2]}
    assert len(grid_of("dare", given, (1.0, 2.0))) == 4
    assert pytest.approx([0.05 * i for i in range(1, 41)]) == LAMBDAS  # arXiv 2411.18607


def test_weights_change_the_scale_and_the_rules() -> None:
    problem = make_problem(2)
    weighted = replace(problem.opened, weights=as_weights((1.0, 3.0), 2))
    found = run(replace(problem, opened=weighted), [("task_arithmetic", {})], [0.2])
    a, b = (u.delta["w"] for u in problem.opened.updates)
    loaded = torch.tensor(problem.goals[0].net.seen[-1])  # type: ignore[attr-defined]
    torch.testing.assert_close(loaded, problem.opened.base["w"] + 0.2 * a + 0.6 * b)
    assert found.rows[1].server_lr == pytest.approx(0.8)


def test_scores_that_are_not_above_zero_are_searched_as_they_are() -> None:
    class Likelihood(Near):
        def scored(self, distance: Tensor) -> Tensor:
            return -(distance**2)

    problem = make_problem(kind=Likelihood)
    found = run(problem, [("task_arithmetic", {})], metric="absolute")
    total = sum(u.delta["w"].double() for u in problem.opened.updates)
    targets = [g.task.targets["val"] for g in problem.goals]  # type: ignore[attr-defined]
    for row in found.rows:
        w = problem.opened.base["w"].double() + row.scaling_coef * total
        wanted = -sum(float(((w - target) ** 2).mean()) for target in targets) / 3
        assert row.value == pytest.approx(wanted, rel=1e-5)
    said = r'task "task0": its own model scores -.* use metric: absolute'
    fails(said, run, problem)
    for width in (0.0, math.nan):
        none = Near("none", targets[0], targets[0], width, constant=True)
        with pytest.raises(DeltaflError, match='task "task1"'):
            run(with_tasks(problem, Near("t", targets[0], targets[0]), none))


def test_every_reason_why_methods_cannot_be_searched_is_told() -> None:
    methods = [("fedgm", {}), ("median", {"rho": 1.0}), ("krum", {"num_byzantine": 2}), *NOVA]
    with pytest.raises(DeltaflError) as error:
        check_methods(methods, [Source("m0", num_steps=1), Source("m1"), Source("m2")])
    starts = ['unknown method "fedgm"', "method median has", "krum"]
    starts += [f'fednova: model "m{i}": ' for i in (1, 2)]
    assert len(error.value.problems) == len(starts)
    assert all(map(str.startswith, error.value.problems, starts))


# Racing


def both(seed: int, **settings: object) -> list[SearchResult]:
    """What an exhaustive search finds, and a race."""
    problems = [make_problem(seed=seed, kind=Answers) for _ in range(2)]
    how = ({}, {"strategy": "racing", **settings})
    pairs = zip(problems, how, strict=True)
    return [run(problem, ALL[:4], LAMBDAS[::2], **changes) for problem, changes in pairs]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("each_method", [False, True])
def test_a_race_finds_the_winner_and_its_exact_value(seed: int, each_method: bool) -> None:
    whole, raced = both(seed, each_method=each_method)
    assert raced.best == whole.best
    assert [(r.label, r.same_as) for r in raced.rows] == [(r.label, r.same_as) for r in whole.rows]
    count = whole.examples["exhaustive"]
    assert raced.examples["evaluated"] < (count if each_method else count / 2.5)
    assert raced.examples["exhaustive"] == whole.examples["evaluated"] == count
    if each_method:
        assert raced.best_of == whole.best_of


def test_dropped_rows_are_kept_marked_and_not_chosen() -> None:
    whole, raced = both(1)
    exact = {r.label: r for r in whole.rows}
    dropped = [r for r in raced.rows if r.dropped_at is not None]
    assert max(r.value for r in dropped) > 0
    assert all(0 < (r.evaluated or 0) < 1500 for r in dropped if r.same_as is None)
    assert all(r == exact[r.label] for r in raced.rows if r.dropped_at is None)
    kept = {r.label for r in raced.rows if r.dropped_at is None and r.same_as is None}
    assert set(raced.scores) == kept
    for label in kept:
        for task, scores in raced.scores[label].items():
            assert torch.equal(scores, whole.scores[label][task])
    row = Row("median", {}, 0.1, 0.3, value=0.5)
    late, early = replace(row, value=0.9, dropped_at=3), replace(row, value=0.95, dropped_at=1)
    assert sorted([late, row, early], key=lambda r: r.rank) == [early, late, row]


def test_updates_that_do_not_fit_are_computed_again_to_the_same_rows(monkeypatch):
    held, again = (both(2, memory=memory)[1] for memory in (8_000_000_000, 0))
    assert (held.rows, held.examples) == (again.rows, again.examples)
    problem, made, make = make_problem(), list[Aggregate](), UpdateCache.make
    rules = [build_rule(*rule) for rule in (("fedgma", {"rho": 1.0}), *ALL[:1], ("median", {}))]
    monkeypatch.setattr(UpdateCache, "make", lambda self, a: made.append(a) or make(self, a))
    for room, wanted in ((0, 0), (48, 5), (144, 3)):  # an update has 48 bytes
        made.clear()
        cache = UpdateCache(room)
        updates = [problem.opened.aggregate(rule) for rule in rules]
        a, b, c = map(cache.add, updates)
        for digest, own in zip((c, a, a, b, c), (2, 0, 0, 1, 2), strict=True):
            assert torch.equal(cache.get(digest)["w"], updates[own]["w"])
        assert len(made) == wanted
    cache.keep({b})
    cache.get(a)
    assert len(made) == 4


def test_what_is_made_of_whole_tensors_is_made_once(monkeypatch, tmp_path):
    problem, made, combine = make_problem(scratch=tmp_path), list[int](), IsoC.combine
    rule = build_rule("iso_c", {})
    update = dict(problem.opened.aggregate(rule))
    monkeypatch.setattr(IsoC, "combine", lambda *given: made.append(1) or combine(*given))
    for _ in range(2):
        found = problem.update(build_rule("iso_c", {}))
        assert all(torch.equal(found[name], update[name]) for name in update)
    assert len(made) == len(update)
