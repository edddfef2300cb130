"""Racing against exhaustive search and its bound against brute force, on made-up scores and models of few numbers."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import pytest
import torch
from torch import Tensor

from deltafl.errors import DeltaflError
from deltafl.merge.candidates import Shelf
from deltafl.merge.race import Finish, critical_value, looks, orders, race, upper_bounds
from deltafl.merge.search import LAMBDAS, Problem, Row, SearchResult, search
from laws.worlds import ByBlocks
from merge.test_search import ALL, Constant, Loaded, Near, make_problem, val_calls


@dataclass
class Scores:
    """A table of scores, (C, N_t) for each task, that counts what a race asks of it."""

    tasks: Sequence[Tensor]
    asked: list[tuple[int, int]] = field(default_factory=list)

    @property
    def sizes(self) -> list[int]:
        return [t.shape[1] for t in self.tasks]

    @property
    def values(self) -> Tensor:
        return torch.stack([t.double().mean(1) for t in self.tasks]).mean(0)

    def judge(
        self, alive: Sequence[int], ids: Sequence[Tensor]
    ) -> Iterator[tuple[int, list[Tensor]]]:
        for c in alive:
            self.asked.append((c, sum(map(len, ids))))
            yield c, [t[c][i] for t, i in zip(self.tasks, ids, strict=True)]

    def race(self, **options: float) -> list[Finish]:
        return race(self.judge, len(self.tasks[0]), self.sizes, [1.0] * len(self.tasks), **options)  # type: ignore[arg-type]

    @property
    def images(self) -> int:
        return sum(n for _, n in self.asked)


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


def winner(scores: Scores, found: Sequence[Finish]) -> int:
    kept = [c for c, f in enumerate(found) if f.dropped_at is None]
    return max(kept, key=lambda c: float(scores.values[c]))


def test_the_winner_is_that_of_an_exhaustive_search_in_at_least_19_of_20_orders_and_takes_far_fewer_images() -> (
    None
):
    for made in range(2):
        scores = grid(made)
        same, images = 0, 0
        for seed in range(20):
            scores.asked.clear()
            same += winner(scores, scores.race(seed=seed)) == int(scores.values.argmax())
            images += scores.images
        assert same >= 19
        assert images / 20 < len(scores.values) * sum(scores.sizes) / 3


def test_contests_keep_the_best_of_each_and_drop_who_has_lost_everywhere() -> None:
    scores = grid(3)
    count = len(scores.values)
    contests = [range(count // 3), range(count // 3, count), [0, count - 1]]
    for seed in range(10):
        found = scores.race(seed=seed, contests=contests)
        for contest in contests:
            best = max(contest, key=lambda c: float(scores.values[c]))
            kept = [c for c in contest if found[c].dropped_at is None]
            assert best in kept
        assert sum(f.dropped_at is not None for f in found) > count / 2
    alone = scores.race(seed=0, contests=[[c] for c in range(count)])
    assert all(f.dropped_at is None for f in alone)


def test_no_seed_loses_a_clear_best_and_confidence_is_what_keeps_it() -> None:
    # The best is ahead by 6 of 200 images; a race that trusts any lead drops it in some orders.
    lost = {0.95: 0, 0.01: 0}
    for made in range(60):
        draw = torch.Generator().manual_seed(made)
        table = (torch.rand(30, 200, generator=draw) < 0.5).to(torch.uint8)
        table[7] = table[3]
        table[7, (table[3] == 0).nonzero()[:6, 0]] = 1
        for i in range(30):
            while i != 7 and table[i].sum() >= table[7].sum():
                table[i, table[i].nonzero()[0, 0]] = 0
        scores = Scores([table])
        for confidence in lost:
            lost[confidence] += (
                scores.race(seed=made, confidence=confidence)[7].dropped_at is not None
            )
    assert lost[0.95] <= 3  # 5% of 60
    assert lost[0.01] > lost[0.95]


@pytest.mark.parametrize("seed", range(5))
def test_a_candidate_that_equals_the_leader_is_never_dropped(seed: int) -> None:
    scores = grid(seed)
    best = int(scores.values.argmax())
    tasks = [torch.cat([t, t[best : best + 1], t[best : best + 1]]) for t in scores.tasks]
    found = Scores(tasks).race(seed=seed)
    assert [found[c].dropped_at for c in (best, 120, 121)] == [None] * 3


def test_equal_means_with_other_examples_survive_to_the_end() -> None:
    table = torch.zeros(2, 64)
    table[0, ::2] = 1
    table[1, 1::2] = 1
    assert [f.dropped_at for f in Scores([table]).race()] == [None, None]


def test_survivors_hold_every_score_in_order_and_the_dropped_their_share() -> None:
    scores = grid(1)
    found = scores.race(seed=4)
    drawn = orders(scores.sizes, 4)
    assert {f.dropped_at for f in found} > {None, 2}
    for c, finish in enumerate(found):
        assert (
            finish.evaluated
            == sum(n for asked, n in scores.asked if asked == c)
            == sum(map(len, finish.scores))
        )
        for got, table, order in zip(finish.scores, scores.tasks, drawn, strict=True):
            wanted = table[c] if finish.dropped_at is None else table[c][order[: len(got)]]
            assert torch.equal(got, wanted)
            assert got.dtype == table.dtype
        if finish.dropped_at is not None:
            assert [len(s) for s in finish.scores] == looks(scores.sizes)[finish.dropped_at - 1]


def test_a_seed_fixes_a_race_and_another_one_draws_other_subsets() -> None:
    def told(seed: int) -> list[tuple[int, int | None]]:
        return [(f.evaluated, f.dropped_at) for f in grid(0).race(seed=seed)]

    assert told(3) == told(3)
    assert told(3) != told(4)
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
                q = sum(v**2 for v in values) / n
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


def test_a_score_that_is_not_a_number_drops_its_candidate_at_once_and_never_leads() -> None:
    scores = grid(0)
    tasks = [t.double() for t in scores.tasks]
    tasks[1][:50] = math.nan
    found = Scores(tasks).race()
    assert {f.dropped_at for f in found[:50]} == {1}
    assert any(f.dropped_at is None for f in found[50:])
    everything = [f.dropped_at for f in Scores([torch.full((3, 40), math.nan)]).race()]
    assert everything == [None, 1, 1]


@pytest.mark.parametrize("confidence", [0.0, 1.0, -1.0, 2.0, math.nan])
def test_a_confidence_outside_of_0_and_1_is_refused(confidence: float) -> None:
    with pytest.raises(DeltaflError, match=r"confidence: .* is not between 0 and 1"):
        grid(0).race(confidence=confidence)
    with pytest.raises(DeltaflError, match="confidence: "):
        search(make_problem(), ALL, strategy="racing", confidence=confidence)


def test_an_unknown_strategy_is_refused_before_anything_is_evaluated() -> None:
    problem = make_problem()
    with pytest.raises(DeltaflError, match='unknown "rasing"; did you mean "racing"'):
        search(problem, ALL, strategy="rasing")
    assert val_calls(problem) == [0, 0, 0]


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


def both(seed: int, **options: int) -> tuple[SearchResult, SearchResult]:
    methods, lambdas = ALL[:4], LAMBDAS[::2]
    whole = search(answering(seed), methods, lambdas=lambdas)
    return whole, search(answering(seed), methods, lambdas=lambdas, strategy="racing", **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", range(3))
def test_a_search_that_races_finds_the_winner_and_its_exact_value(seed: int) -> None:
    whole, raced = both(seed)
    assert raced.best.label == whole.best.label
    assert (raced.best.value, raced.best.val) == (whole.best.value, whole.best.val)
    assert raced.best.dropped_at is None
    assert [r.label for r in raced.rows] == [r.label for r in whole.rows]
    assert [r.same_as for r in raced.rows] == [r.same_as for r in whole.rows]
    assert raced.examples < whole.examples / 2.5
    assert raced.exhaustive_examples == whole.exhaustive_examples == whole.examples
    assert raced.examples == sum(r.evaluated or 0 for r in raced.rows)


@pytest.mark.parametrize("seed", range(3))
def test_a_race_within_each_method_finds_the_best_of_every_method(seed: int) -> None:
    whole, raced = both(seed, each_method=True)
    assert {m: (r.label, r.value) for m, r in raced.best_of.items()} == {
        m: (r.label, r.value) for m, r in whole.best_of.items()
    }
    assert raced.examples < whole.examples


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
            assert row.label not in raced.correct
    kept = {r.label for r in raced.rows if r.dropped_at is None and r.same_as is None}
    assert set(raced.correct) == kept
    for label in kept:
        for task, scores in raced.correct[label].items():
            assert torch.equal(scores, whole.correct[label][task])
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


def test_a_shelf_never_holds_more_than_its_room() -> None:
    shelf = Shelf(40, 1)
    update = ByBlocks({"w": torch.ones(10)})
    a, b = (shelf.put(update, {"w": torch.ones(10)}, d) for d in "ab")  # type: ignore[arg-type]
    assert (a.tensors is None, b.tensors is None, shelf.room) == (False, True, 0)
    shelf.get(a)
    assert update.reads == 0
    assert torch.equal(shelf.get(b)["w"], torch.ones(10))
    assert (update.reads, b.tensors) == (1, None)
    shelf.drop(a)
    assert shelf.room == 40
    shelf.get(b)
    assert b.tensors is not None


def test_every_row_is_told_once() -> None:
    told: list[Row] = []
    found = search(answering(), ALL, lambdas=LAMBDAS[::8], strategy="racing", on_row=told.append)
    assert sorted(r.label for r in told) == sorted(r.label for r in found.rows)
    assert {r.label: r for r in told} == {r.label: r for r in found.rows}


def test_the_base_races_and_wins_ties() -> None:
    problem = make_problem()
    goals = [replace(g, val=Constant(torch.zeros(70))) for g in problem.goals]
    found = search(replace(problem, goals=goals), ALL, lambdas=LAMBDAS[::8], strategy="racing")
    assert found.best is found.base is found.rows[0]
    near = [replace(g, val=Near(problem.base["w"], 0.3)) for g in problem.goals]
    raced = search(replace(problem, goals=near), ALL, lambdas=LAMBDAS[::8], strategy="racing")
    assert raced.best.method == "base"
