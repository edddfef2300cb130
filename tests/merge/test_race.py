"""Racing against exhaustive search and its bound against brute force, on made-up scores and models of few numbers."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from deltafl.algebra.aggregate import Aggregate
from deltafl.errors import DeltaflError
from deltafl.merge.candidates import Row
from deltafl.merge.problem import Problem
from deltafl.merge.race import critical_value, looks, orders, race, upper_bounds
from deltafl.merge.search import SearchResult
from deltafl.merge.search_recipe import LAMBDAS
from deltafl.merge.updates import UpdateCache
from deltafl.rules.rule import build_rule
from merge.test_search import ALL, Constant, Loaded, Near, make_problem, run


@dataclass
class Scores:
    """A table of scores, (C, N_t) for each task, that counts what a race asks of it."""

    tasks: Sequence[Tensor]
    examples: int = 0

    @property
    def sizes(self) -> list[int]:
        return [t.shape[1] for t in self.tasks]

    @property
    def values(self) -> Tensor:
        return torch.stack([t.double().mean(1) for t in self.tasks]).mean(0)

    def race(self, seed: int = 0, confidence: float = 0.95) -> list[int | None]:
        plan, drawn = looks(self.sizes), orders(self.sizes, seed)

        def judge(alive: Sequence[int], look: int) -> list[Tensor]:
            new = sum(plan[look]) - (sum(plan[look - 1]) if look else 0)
            self.examples += len(alive) * new
            spans = zip(self.tasks, drawn, plan[look], strict=True)
            return [table[list(alive)][:, order[:count]] for table, order, count in spans]

        return race(judge, len(self.tasks[0]), plan, [1.0] * len(self.tasks), confidence)

    def loses(self, seed: int = 0, confidence: float = 0.95) -> bool:
        """Whether a race drops the best on all data."""
        return self.race(seed, confidence)[int(self.values.argmax())] is not None


def grid(seed: int, candidates: int = 120, sizes: Sequence[int] = (600, 900, 700)) -> Scores:
    """Right or wrong answers along a few lambda curves: most examples are right below a threshold of the accuracy."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.linspace(0, 2, candidates // 3).repeat(3)
    height = torch.tensor([0.9, 0.86, 0.8]).repeat_interleave(candidates // 3)
    accuracy = height * torch.exp(-((x - 0.5) ** 2))
    tasks = []
    for size in sizes:
        hard = torch.rand(size, generator=draw)
        flips = torch.rand(candidates, size, generator=draw) < 0.02
        tasks.append(((hard[None] < accuracy[:, None]) ^ flips).to(torch.uint8))
    return Scores(tasks)


def test_the_winner_is_that_of_an_exhaustive_search_in_at_least_19_of_20_orders_for_far_fewer_examples() -> (
    None
):
    for made in range(2):
        scores = grid(made)
        assert sum(scores.loses(seed) for seed in range(20)) <= 1
        assert scores.examples / 20 < len(scores.values) * sum(scores.sizes) / 3


def test_no_seed_loses_a_clear_best_and_confidence_is_what_keeps_it() -> None:
    # The best is ahead by 6 of 200 examples; a race that trusts any lead drops it in some orders.
    lost = {0.95: 0, 0.01: 0}
    for made in range(60):
        draw = torch.Generator().manual_seed(made)
        table = (torch.rand(30, 200, generator=draw) < 0.5).to(torch.uint8)
        table[7] = table[3]
        table[7, (table[3] == 0).nonzero()[:6, 0]] = 1
        for i in range(30):
            while i != 7 and table[i].sum() >= table[7].sum():
                table[i, table[i].nonzero()[0, 0]] = 0
        for confidence in lost:
            lost[confidence] += Scores([table]).loses(made, confidence)
    assert lost[0.95] <= 3  # 5% of 60
    assert lost[0.01] > lost[0.95]


# Scores that are real numbers


def exponential(*shape: int, draw: torch.Generator) -> Tensor:
    return -torch.log(torch.rand(shape, generator=draw, dtype=torch.float64))


def student(*shape: int, draw: torch.Generator) -> Tensor:
    """Student's t with 3 degrees of freedom: its fourth moment is infinite."""
    normal = torch.randn(4, *shape, generator=draw, dtype=torch.float64)
    return normal[0] / normal[1:].square().mean(0).sqrt()


NOISE: dict[str, Callable[..., Tensor]] = {
    "normal": lambda *shape, draw: torch.randn(shape, generator=draw, dtype=torch.float64),
    "student": student,
    "rare gains": exponential,
    "rare losses": lambda *shape, draw: -exponential(*shape, draw=draw),
}


def likelihoods(noise: str, seed: int, gap: float) -> Scores:
    """Log-likelihoods around -3 of 20 candidates: what an example is worth, and noise of each.

    On all data every candidate is behind the first by up to `gap`; 0: all are as good, the case in
    which a race errs most easily.
    """
    draw = torch.Generator().manual_seed(seed)
    tasks = []
    for size in (400, 250):
        scores = NOISE[noise](20, size, draw=draw)
        scores -= scores.mean(1, keepdim=True)
        scores[1:] -= gap * torch.rand(19, 1, generator=draw) + 1e-9
        tasks.append(scores - 3 + 2 * torch.randn(size, generator=draw))
    return Scores(tasks)


@pytest.mark.parametrize("noise", NOISE)
def test_the_best_log_likelihood_is_kept_as_often_as_the_confidence_says(noise: str) -> None:
    lost = sum(likelihoods(noise, seed, gap=0.0).loses(seed) for seed in range(80))
    assert lost <= 8  # 5 % of 80 is 4; more than 8 has a chance of 2 %


@pytest.mark.parametrize("noise", NOISE)
def test_a_race_of_log_likelihoods_saves_examples_where_candidates_differ(noise: str) -> None:
    for seed in range(10):
        scores = likelihoods(noise, seed, gap=1.5)
        assert not scores.loses(seed)
        assert scores.examples < 20 * 650 / 2


@pytest.mark.parametrize("offset", [-3.0, 1024.0])
def test_what_all_scores_of_an_example_share_does_not_count(offset: float) -> None:
    # In steps of 2^-20, so that no sum is rounded.
    tasks = [(t * 2**20).round() / 2**20 for t in likelihoods("normal", 0, gap=1.0).tasks]
    shared = torch.Generator().manual_seed(1)
    moved = [t + offset * torch.randint(0, 9, t[:1].shape, generator=shared) for t in tasks]
    assert Scores(moved).race(3) == Scores(tasks).race(3)


@pytest.mark.parametrize("seed", range(5))
def test_a_candidate_that_equals_the_leader_is_never_dropped(seed: int) -> None:
    scores = grid(seed)
    best = int(scores.values.argmax())
    tasks = [torch.cat([t, t[best : best + 1], t[best : best + 1]]) for t in scores.tasks]
    found = Scores(tasks).race(seed)
    assert [found[c] for c in (best, 120, 121)] == [None] * 3


def test_equal_means_with_other_examples_survive_to_the_end() -> None:
    table = torch.zeros(2, 64)
    table[0, ::2] = 1
    table[1, 1::2] = 1
    assert Scores([table]).race() == [None, None]


def test_a_seed_fixes_a_race_and_another_one_draws_other_subsets() -> None:
    assert grid(0).race(3) == grid(0).race(3) != grid(0).race(4)
    first, other = orders([50, 50], 0)
    assert sorted(first.tolist()) == list(range(50))
    assert not torch.equal(first, other)
    assert not torch.equal(first, orders([50, 50], 1)[0])


def test_looks_grow_by_half_and_end_with_everything() -> None:
    assert looks([50, 20, 10]) == [
        [8, 8, 8],
        [12, 12, 10],
        [18, 18, 10],
        [27, 20, 10],
        [40, 20, 10],
        [50, 20, 10],
    ]
    assert (looks([8, 8]), looks([3])) == ([[8, 8]], [[3]])


# The bound


@pytest.mark.parametrize(
    ("confidence", "inexact", "pairs"), [(0.95, 6, 15), (0.5, 2, 1), (0.999, 3, 3)]
)
def test_the_critical_value_shares_the_error_among_pairs_of_looks(
    confidence: float, inexact: int, pairs: int
) -> None:
    z = critical_value(confidence, inexact)
    assert math.erfc(z / math.sqrt(2)) / 2 * pairs == pytest.approx(1 - confidence)


def test_the_bound_is_its_formula() -> None:
    draw = torch.Generator().manual_seed(0)
    sizes, counts, known, scale = [40, 100, 7], [16, 16, 7], [8, 0, 7], [1.25, 2.0, 1.0]
    differences = [torch.randn(5, n, generator=draw, dtype=torch.float64) for n in counts]
    upper = upper_bounds(differences, known, sizes, scale, 3.0)
    for c in range(5):
        mean, variance = 0.0, 0.0
        for d, k, size, n, a in zip(differences, known, sizes, counts, scale, strict=True):
            values = d[c].tolist()
            rest = (size - k) * sum(values[k:]) / (n - k) if n > k else 0.0
            mean += a * (sum(values[:k]) + rest) / size / 3
            if n < size:
                new = values[k:]
                q = max(sum(v**2 for v in values) / n, sum(v**2 for v in new) / len(new))
                variance += (
                    a**2 / 9 * ((size - k) / size) ** 2 * (size - n) / (size - k) * q / (n - k)
                )
        assert float(upper[c]) == pytest.approx(mean + 3.0 * math.sqrt(variance))


@pytest.mark.parametrize("known", [0, 10])
def test_the_bound_of_everything_is_the_mean(known: int) -> None:
    d = torch.randn(4, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(upper_bounds([d], [known], [30], [1.0], math.inf), d.mean(1))


@pytest.mark.parametrize(("known", "n"), [(0, 16), (0, 64), (8, 64), (50, 150)])
def test_the_bound_covers_the_difference_on_all_data_as_often_as_it_says(
    known: int, n: int
) -> None:
    # Paired differences of two models that disagree on a fifth of 200 examples and are equally good: the hardest case.
    population = torch.zeros(200, dtype=torch.float64)
    population[:20], population[20:40] = 1, -1
    draw = torch.Generator().manual_seed(n)
    picked = torch.rand(20_000, 200, generator=draw).argsort(1)[:, :n]
    upper = upper_bounds([population[picked]], [known], [200], [1.0], 1.6449)
    missed = float((upper < 0).double().mean())
    assert 0.01 < missed <= 0.06  # 5% one-sided, and the grid of few differing examples


# What is no number, and what is refused


@pytest.mark.parametrize("bad", [math.nan, -math.inf])
def test_a_score_that_is_no_finite_number_drops_its_candidate_at_once_and_never_leads(
    bad: float,
) -> None:
    tasks = [t.double() for t in grid(0).tasks]
    tasks[1][:50] = bad
    found = Scores(tasks).race()
    assert set(found[:50]) == {1}
    assert None in found[50:]
    assert Scores([torch.full((3, 40), bad)]).race() == [None, 1, 1]


@pytest.mark.parametrize("confidence", [0.0, 1.0, -1.0, 2.0, math.nan])
def test_a_confidence_outside_of_0_and_1_is_refused(confidence: float) -> None:
    with pytest.raises(DeltaflError, match=r"confidence: .* is not between 0 and 1"):
        grid(0).race(confidence=confidence)


def test_a_task_without_examples_is_refused() -> None:
    with pytest.raises(DeltaflError, match="no validation examples"):
        Scores([torch.ones(2, 0)]).race()


# In a search


@dataclass
class Answers(Near):
    """Right for the examples whose own patience is above the model's distance from the target."""

    def __len__(self) -> int:
        return 500

    def __call__(self, model: Loaded, ids: Tensor) -> Tensor:
        self.calls += 1
        distance = ((model.w - self.target) ** 2).mean() / self.width**2
        draw = torch.Generator().manual_seed(int(self.target.abs().sum() * 1e4))
        return (torch.rand(500, generator=draw)[ids] < torch.exp(-distance)).to(torch.uint8)


def answering(seed: int = 0) -> Problem:
    problem = make_problem(3, seed=seed)
    goals = [replace(g, val=Answers(g.val.target, 3.0)) for g in problem.goals]  # type: ignore[attr-defined]
    return replace(problem, goals=goals)


def both(seed: int, **settings: object) -> tuple[SearchResult, SearchResult]:
    """What an exhaustive search finds, and a race."""
    whole = run(answering(seed), ALL[:4], LAMBDAS[::2])
    return whole, run(answering(seed), ALL[:4], LAMBDAS[::2], strategy="racing", **settings)


@pytest.mark.parametrize("seed", range(3))
def test_a_search_that_races_finds_the_winner_and_its_exact_value(seed: int) -> None:
    whole, raced = both(seed)
    assert raced.best.label == whole.best.label
    assert (raced.best.value, raced.best.val) == (whole.best.value, whole.best.val)
    assert raced.best.dropped_at is None
    assert [r.label for r in raced.rows] == [r.label for r in whole.rows]
    assert [r.same_as for r in raced.rows] == [r.same_as for r in whole.rows]
    count = whole.examples["exhaustive"]
    assert raced.examples["evaluated"] < count / 2.5
    assert raced.examples["exhaustive"] == whole.examples["evaluated"] == count


@pytest.mark.parametrize("seed", range(3))
def test_a_race_within_each_method_finds_the_best_of_every_method(seed: int) -> None:
    whole, raced = both(seed, each_method=True)
    assert {m: (r.label, r.value) for m, r in raced.best_of.items()} == {
        m: (r.label, r.value) for m, r in whole.best_of.items()
    }
    assert raced.examples["evaluated"] < whole.examples["evaluated"]


def test_dropped_rows_are_kept_marked_and_not_chosen() -> None:
    whole, raced = both(1)
    exact = {r.label: r for r in whole.rows}
    dropped = [r for r in raced.rows if r.dropped_at is not None]
    assert dropped
    for row in raced.rows:
        if row.dropped_at is None:
            assert (row.val, row.value) == (exact[row.label].val, exact[row.label].value)
        elif row.same_as is None:
            assert row.evaluated is not None
            assert 0 < row.evaluated < 1500
            assert row.label not in raced.scores
    kept = {r.label for r in raced.rows if r.dropped_at is None and r.same_as is None}
    assert set(raced.scores) == kept
    for label in kept:
        for task, scores in raced.scores[label].items():
            assert torch.equal(scores, whole.scores[label][task])
    estimates = [r.value for r in dropped]
    assert max(estimates) > 0
    for row in raced.best_of.values():
        mine = [r for r in raced.rows if r.method == row.method]
        assert row.rank == max(r.rank for r in mine)


def test_an_estimate_never_goes_before_an_exact_value() -> None:
    exact = Row("median", {}, 0.1, 0.3, value=0.5)
    late, early = replace(exact, value=0.9, dropped_at=3), replace(exact, value=0.95, dropped_at=1)
    assert sorted([late, exact, early], key=lambda r: r.rank) == [early, late, exact]
    assert exact.rank > replace(exact, value=math.nan).rank


def test_updates_that_do_not_fit_are_computed_again_to_the_same_rows() -> None:
    held, again = (both(2, memory=memory)[1] for memory in (8_000_000_000, 0))
    assert held.rows == again.rows
    assert held.examples == again.examples


def test_updates_in_memory_are_the_one_used_last_and_as_many_as_fit() -> None:
    problem = make_problem(3, dims=10)
    rules = [build_rule(*rule) for rule in (("fedgma", {"rho": 1.0}), *ALL[:1], ("median", {}))]
    made: list[object] = []

    class Counting(UpdateCache):
        def make(self, aggregate: Aggregate) -> dict[str, Tensor]:
            made.append(aggregate)
            return super().make(aggregate)

    for room, wanted in ((0, 6), (40, 5), (120, 3)):
        made.clear()
        cache = Counting(room)
        a, b, c = (cache.add(problem.aggregate(rule)) for rule in rules)
        for digest in (c, a, a, b, c):
            cache.get(digest)
        assert len(made) == wanted
        mean = torch.stack([u.delta["w"] for u in problem.updates]).mean(0)
        torch.testing.assert_close(cache.get(b)["w"], mean)
    cache.keep({b})
    cache.get(a)
    assert len(made) == 4


def test_the_base_races_and_wins_ties() -> None:
    problem = make_problem()
    goals = [replace(g, val=Constant(torch.zeros(70))) for g in problem.goals]
    found = run(replace(problem, goals=goals), lambdas=LAMBDAS[::8], strategy="racing")
    assert found.best is found.base is found.rows[0]
    near = [replace(g, val=Near(problem.base["w"], 0.3)) for g in problem.goals]
    raced = run(replace(problem, goals=near), lambdas=LAMBDAS[::8], strategy="racing")
    assert raced.best.method == "base"
