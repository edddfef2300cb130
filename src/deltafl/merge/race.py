"""Race candidates over shared, growing validation subsets, dropping one as soon as a bound says that it cannot win.

A race knows of candidates only what `judge` tells: per-example scores. All candidates see the same examples, so that
two are compared by paired differences, whose variance is far below that of either score.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from statistics import NormalDist

import torch
from torch import Tensor

from deltafl.errors import DeltaflError
from deltafl.seeding import keyed_generator

FIRST = 8
"""Examples of each task at the first look; every further look adds half as many again."""

ROUNDING = 1e-12
"""Sums of equal worth may differ by this much in float64; no candidate is dropped for it."""

Judge = Callable[[Sequence[int], Sequence[Tensor]], Iterable[tuple[int, Sequence[Tensor]]]]
"""(candidates, ids of each task) -> (candidate, scores (n_t,) of each task), once for each candidate, in any order."""


@dataclass(frozen=True)
class Finish:
    """How far one candidate came.

    scores: of each task, (n_t,), in the order of the race's subset, or of the examples where all were seen.
    evaluated: examples, over all tasks. dropped_at: the look (from 1) after which it was dropped; None: it was kept.
    """

    scores: tuple[Tensor, ...]
    evaluated: int
    dropped_at: int | None


def orders(sizes: Sequence[int], seed: int) -> list[Tensor]:
    """For each task the one random order in which all candidates see its examples, int64 (N_t,)."""
    return [
        torch.randperm(size, generator=keyed_generator(seed, "racing", task, size))
        for task, size in enumerate(sizes)
    ]


def looks(sizes: Sequence[int], first: int = FIRST) -> list[list[int]]:
    """Examples of each task seen by each look: first, then half as many again, a task's size at most, all at last."""
    found, count = [], first
    while count < max(sizes):
        found.append([min(count, size) for size in sizes])
        count = max(count + 1, count * 3 // 2)
    return [*found, list(sizes)]


def critical_value(confidence: float, inexact_looks: int) -> float:
    """z with 1 - Phi(z) = (1 - confidence) / (K (K - 1) / 2), for K looks before the exact one.

    The leader after look j is compared with everyone at each later look k, by examples drawn after it was chosen.
    Given the first j looks it is one fixed candidate, so the best candidate takes part in a single comparison for each
    pair j < k: Bonferroni over pairs of looks holds for any number of candidates, though who leads is known only from
    the data. Infinite where 1 - confidence vanishes in float64.
    """
    share = (1 - confidence) / max(inexact_looks * (inexact_looks - 1) / 2, 1)
    return -NormalDist().inv_cdf(share) if share > 0 else math.inf


def upper_bounds(
    differences: Sequence[Tensor],
    known: Sequence[int],
    sizes: Sequence[int],
    scale: Sequence[float],
    z: float,
) -> Tensor:
    """Upper confidence bounds of (candidate - leader) on the full validation data, float64 (C,).

        bound = 1/T sum_t a_t m_t + z sqrt(1/T^2 sum_t a_t^2 v_t)
        m_t   = (sum of the first k_t d_ti + (N_t - k_t) mean of the others) / N_t
        v_t   = ((N_t - k_t) / N_t)^2 (1 - f_t / (N_t - k_t)) q_t / f_t,   q_t = mean of all n_t d_ti^2

    differences: for each of T tasks (C, n_t), paired, on n_t of its N_t = sizes[t] examples drawn without
    replacement. known: k_t, how many of them, the first, were seen when the leader was chosen: they count as they are,
    and the f_t = n_t - k_t others estimate the rest. scale: a_t, the worth of a unit of the task's score. A normal
    approximation, with the correction for a finite population: at n_t = N_t the bound is the mean. q_t is taken about
    zero, as in McNemar's test, and not about the mean: it is not below the variance, and it does not vanish where a
    few examples all differ by the same.
    """
    mean = torch.zeros(len(differences[0]), dtype=torch.float64)
    variance = torch.zeros_like(mean)
    for d, k, size, a in zip(differences, known, sizes, scale, strict=True):
        old, fresh = d[:, :k].sum(1), d[:, k:]
        rest, count = size - k, fresh.shape[1]
        if count:
            mean += a * (old + rest * fresh.mean(1)) / size
            variance += (a * rest / size) ** 2 * (1 - count / rest) / count * d.square().mean(1)
        else:
            mean += a * old / k
    return (mean + torch.where(variance > 0, z * variance.sqrt(), 0.0)) / len(sizes)


def check_confidence(confidence: float) -> None:
    """Raise DeltaflError unless 0 < confidence < 1."""
    if not 0 < confidence < 1:
        raise DeltaflError(
            f"confidence: {confidence:g} is not between 0 and 1; a usual value is 0.95"
        )


@dataclass
class _Contest:
    """Candidates of which the best is wanted, and who led after each look, with how many examples of each task."""

    members: frozenset[int]
    leaders: list[tuple[int, list[int]]] = field(default_factory=list)

    def lost(
        self,
        alive: Sequence[int],
        values: Tensor,
        stacks: Sequence[Tensor],
        bounds: Callable[[Sequence[Tensor], Sequence[int]], Tensor],
    ) -> Tensor:
        """Which of `alive` an earlier leader beats, bool (A,); who is no member has lost, the first one never has.

        values (A,): means so far; stacks: scores (A, n_t) of each task; bounds: see `upper_bounds`.
        """
        outside = torch.tensor([c not in self.members for c in alive])
        if outside.all():
            return outside
        behind = values.isnan()
        for leader, known in self.leaders:
            if leader in alive:
                behind |= bounds([s - s[alive.index(leader)] for s in stacks], known) < -ROUNDING
        first = self._first(alive, values)
        behind &= values != values[first]
        behind[first] = False
        return outside | behind

    def choose(self, alive: Sequence[int], values: Tensor, counts: list[int]) -> None:
        """Note who leads now."""
        if not self.members.isdisjoint(alive):
            self.leaders.append((alive[self._first(alive, values)], counts))

    def _first(self, alive: Sequence[int], values: Tensor) -> int:
        ranked = [-math.inf if math.isnan(v) else v for v in values.tolist()]
        return max((i for i, c in enumerate(alive) if c in self.members), key=lambda i: ranked[i])


def race(
    judge: Judge,
    candidates: int,
    sizes: Sequence[int],
    scale: Sequence[float],
    *,
    contests: Sequence[Sequence[int]] | None = None,
    confidence: float = 0.95,
    seed: int = 0,
    on_finish: Callable[[int, Finish], None] = lambda candidate, finish: None,
) -> list[Finish]:
    """Evaluate `candidates` (at least 1) on growing subsets; after each look drop those with an upper bound below 0.

    contests: who competes with whom; each candidate is in at least one, and is dropped once it has lost all that it is
    in. None: one contest of all.

    A candidate's value is the mean over tasks of scale[t] * mean score. The leader after a look is the candidate with
    the highest mean so far, the first of equal ones; neither it nor an equal one is dropped then. At every later look
    all are compared with it by the examples seen since (see `critical_value`, `upper_bounds` for what is approximate).
    Those that are left at last see all N_t = sizes[t] examples of each task; with `confidence`, the candidate that is
    best on the full data of its contest is among them. A score that is not a number drops its candidate at once: its
    mean over all examples is none either.

    Raises:
        DeltaflError: confidence is not between 0 and 1, or a task has no examples.
    """
    check_confidence(confidence)
    if min(sizes) < 1:
        raise DeltaflError(
            "a task has no validation examples; a search needs at least one of each task"
        )
    drawn, plan = orders(sizes, seed), looks(sizes)
    z = critical_value(confidence, len(plan) - 1)
    rounds = [_Contest(frozenset(members)) for members in contests or [range(candidates)]]
    seen: dict[int, list[Tensor]] = {}
    finished: dict[int, Finish] = {}
    before = [0] * len(sizes)
    alive = list(range(candidates))

    def finish(candidate: int, look: int | None) -> None:
        scores = seen.pop(candidate)
        count = sum(map(len, scores))
        if count == sum(sizes):
            scores = [s[order.argsort()] for s, order in zip(scores, drawn, strict=True)]
        finished[candidate] = Finish(tuple(scores), count, look)
        on_finish(candidate, finished[candidate])

    for look, counts in enumerate(plan, 1):
        ids = [order[start:stop] for order, start, stop in zip(drawn, before, counts, strict=True)]
        for candidate, scores in judge(alive, ids):
            old = seen.get(candidate)
            pairs = zip(old, scores, strict=True) if old else ((new, new[:0]) for new in scores)
            seen[candidate] = [torch.cat([a, b]) if len(b) else a for a, b in pairs]
        before = counts
        if look == len(plan):
            break
        stacks = [
            torch.stack([seen[c][task] for c in alive]).double() for task in range(len(sizes))
        ]
        values = torch.stack([a * s.mean(1) for a, s in zip(scale, stacks, strict=True)]).sum(0)
        gone_now = torch.ones(len(alive), dtype=torch.bool)
        for contest in rounds:
            gone_now &= contest.lost(
                alive, values, stacks, lambda d, known: upper_bounds(d, known, sizes, scale, z)
            )
            contest.choose(alive, values, counts)
        lost = gone_now.tolist()
        for candidate, gone in zip(alive, lost, strict=True):
            if gone:
                finish(candidate, look)
        alive = [c for c, gone in zip(alive, lost, strict=True) if not gone]
    for candidate in alive:
        finish(candidate, None)
    return [finished[c] for c in range(candidates)]
