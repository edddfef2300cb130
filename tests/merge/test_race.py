"""Racing against exhaustive search and its bound against brute force, on made-up scores."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from checkpoint_files import fails
from deltafl.errors import DeltaflError
from deltafl.merge.race import critical_value, looks, orders, race, upper_bounds


@dataclass
class Scores:
    """A table of scores, (C, N_t) for each task, that counts what a race asks of it."""

    tasks: Sequence[Tensor]
    examples: int = 0

    @property
    def values(self) -> Tensor:
        return torch.stack([t.double().mean(1) for t in self.tasks]).mean(0)

    def race(self, seed: int = 0, confidence: float = 0.95) -> list[int | None]:
        sizes = [t.shape[1] for t in self.tasks]
        plan, drawn = looks(sizes), orders(sizes, seed)

        def judge(alive: Sequence[int], look: int) -> list[Tensor]:
            new = sum(plan[look]) - (sum(plan[look - 1]) if look else 0)
            self.examples += len(alive) * new
            spans = zip(self.tasks, drawn, plan[look], strict=True)
            return [table[list(alive)][:, order[:count]] for table, order, count in spans]

        return race(judge, len(self.tasks[0]), plan, [1.0] * len(self.tasks), confidence)

    def loses(self, seed: int = 0, confidence: float = 0.95) -> bool:
        """Whether a race drops the best on all data."""
        return self.race(seed, confidence)[int(self.values.argmax())] is not None


def grid(seed: int) -> Scores:
    """Right or wrong answers along three lambda curves, right below a threshold of the accuracy."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.linspace(0, 2, 40).repeat(3)
    height = torch.tensor([0.9, 0.86, 0.8]).repeat_interleave(40)
    accuracy, tasks = height * torch.exp(-((x - 0.5) ** 2)), []
    for size in (600, 900, 700):
        hard = torch.rand(size, generator=draw)
        flips = torch.rand(120, size, generator=draw) < 0.02
        tasks.append(((hard[None] < accuracy[:, None]) ^ flips).to(torch.uint8))
    return Scores(tasks)


def test_at_least_19_of_20_orders_find_the_winner_for_far_fewer_examples() -> None:
    for made in range(2):
        scores = grid(made)
        assert sum(scores.loses(seed) for seed in range(20)) <= 1
        assert scores.examples / 20 < 120 * 2200 / 3


NOISE: dict[str, Callable[[Tensor], Tensor]] = {
    "normal": lambda normal: normal[0],
    "student": lambda normal: normal[0] / normal[1:].square().mean(0).sqrt(),
    "rare gains": lambda normal: normal[0].square(),
    "rare losses": lambda normal: -normal[0].square(),
}


def likelihoods(noise: str, seed: int, gap: float) -> Scores:
    """Log-likelihoods around -3 of 20 candidates: what an example is worth, and noise of each.

    On all data every candidate is behind the first by up to `gap`; 0: all are as good, the case in
    which a race errs most easily.
    """
    draw, tasks = torch.Generator().manual_seed(seed), []
    for size in (400, 250):
        scores = NOISE[noise](torch.randn(4, 20, size, generator=draw, dtype=torch.float64))
        scores -= scores.mean(1, keepdim=True)
        scores[1:] -= gap * torch.rand(19, 1, generator=draw) + 1e-9
        tasks.append(scores - 3 + 2 * torch.randn(size, generator=draw))
    return Scores(tasks)


@pytest.mark.parametrize("noise", NOISE)
def test_the_best_log_likelihood_is_kept_as_often_as_the_confidence_says(noise: str) -> None:
    lost = sum(likelihoods(noise, seed, gap=0.0).loses(seed) for seed in range(80))
    assert lost <= 8  # 5 % of 80 is 4; more than 8 has a chance of 2 %
    for seed in range(10):  # and examples are saved where candidates differ
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


def test_candidates_of_equal_worth_survive_to_the_end() -> None:
    for seed in range(5):
        scores = grid(seed)
        best = int(scores.values.argmax())
        found = Scores([torch.cat([t, t[[best, best]]]) for t in scores.tasks]).race(seed)
        assert [found[c] for c in (best, 120, 121)] == [None] * 3


def test_looks_grow_by_half_and_a_seed_fixes_the_orders() -> None:
    assert grid(0).race(3) == grid(0).race(3) != grid(0).race(4)
    first, other = orders([50, 50], 0)
    assert sorted(first.tolist()) == list(range(50))
    assert not torch.equal(first, other)
    sizes = [(8, 8, 8), (12, 12, 10), (18, 18, 10), (27, 20, 10), (40, 20, 10), (50, 20, 10)]
    assert looks([50, 20, 10]) == [list(size) for size in sizes]
    assert (looks([8, 8]), looks([3])) == ([[8, 8]], [[3]])


def test_the_bound_is_its_formula() -> None:
    for confidence, inexact, pairs in ((0.95, 6, 15), (0.5, 2, 1), (0.999, 3, 3)):
        z = critical_value(confidence, inexact)
        assert math.erfc(z / math.sqrt(2)) / 2 * pairs == pytest.approx(1 - confidence)
    draw = torch.Generator().manual_seed(0)
    sizes, counts, known, scale = [40, 100, 7], [16, 16, 7], [8, 0, 7], [1.25, 2.0, 1.0]
    differences = [torch.randn(5, n, generator=draw, dtype=torch.float64) for n in counts]
    upper = upper_bounds(differences, known, sizes, scale, 3.0)
    for c in range(5):
        mean, variance = 0.0, 0.0
        for d, k, size, n, a in zip(differences, known, sizes, counts, scale, strict=True):
            old, new = d[c].tolist()[:k], d[c].tolist()[k:]
            rest = (size - k) * sum(new) / (n - k) if new else 0.0
            mean += a * (sum(old) + rest) / size / 3
            if n < size:
                q = max(sum(v**2 for v in old + new) / n, sum(v**2 for v in new) / len(new))
                share = ((size - k) / size) ** 2 * (size - n) / (size - k)
                variance += a**2 / 9 * share * q / (n - k)
        assert float(upper[c]) == pytest.approx(mean + 3.0 * math.sqrt(variance))
    for k in (0, 10):  # the bound of everything is the mean
        d = torch.randn(4, 30, dtype=torch.float64, generator=draw)
        torch.testing.assert_close(upper_bounds([d], [k], [30], [1.0], math.inf), d.mean(1))


@pytest.mark.parametrize("bad", [math.nan, -math.inf])
def test_a_score_that_is_no_finite_number_drops_its_candidate_at_once(bad: float) -> None:
    tasks = [t.double() for t in grid(0).tasks]
    tasks[1][:50] = bad
    found = Scores(tasks).race()
    assert set(found[:50]) == {1}
    assert None in found[50:]
    assert Scores([torch.full((3, 40), bad)]).race() == [None, 1, 1]


def test_what_is_refused() -> None:
    for confidence in (0.0, 1.0, -1.0, 2.0, math.nan):
        with pytest.raises(DeltaflError, match=r"confidence: .* is not between 0 and 1"):
            grid(0).race(confidence=confidence)
    fails("no validation examples", lambda: Scores([torch.ones(2, 0)]).race())
