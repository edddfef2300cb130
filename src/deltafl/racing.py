"""Race candidates over shared, growing validation subsets, dropping one as soon as a bound says that it cannot win.

A race knows of candidates only what `judge` tells: per-example scores. All candidates see the same examples, so that
two are compared by paired differences, whose variance is far below that of either score.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor

from deltafl.errors import DeltaflError
from deltafl.training import keyed_generator

FIRST = 16
"""Examples of each task at the first look; every further look doubles them."""

ROUNDING = 1e-12
"""Sums of equal worth may differ by this much in float64; no candidate is dropped for it."""

Judge = Callable[[Sequence[int], Sequence[Tensor]], Iterable[tuple[int, Sequence[Tensor]]]]
"""(candidates, ids of each task) -> (candidate, scores (n_t,) of each task), once for each candidate, in any order."""


@dataclass(frozen=True)
class Finish:
    """How far one candidate came.

    scores: of each task, (n_t,), in the order of the race's subset, or of the examples where all were seen.
    evaluated: images, over all tasks. dropped_at: the look (from 1) after which it was dropped; None: it was kept.
    """

    scores: tuple[Tensor, ...]
    evaluated: int
    dropped_at: int | None


def orders(sizes: Sequence[int], seed: int) -> list[Tensor]:
    """For each task the one random order in which all candidates see its examples, int64 (N_t,)."""
    return [
        torch.randperm(size, generator=keyed_generator(seed, "racing", task, size)) for task, size in enumerate(sizes)
    ]


def looks(sizes: Sequence[int], first: int = FIRST) -> list[list[int]]:
    """Examples of each task seen by each look: first, 2 first, 4 first, .., a task's own size at most, all at last."""
    found, count = [], first
    while count < max(sizes):
        found.append([min(count, size) for size in sizes])
        count *= 2
    return [*found, list(sizes)]


def critical_value(confidence: float, candidates: int, inexact_looks: int) -> float:
    """z with 1 - Phi(z) = (1 - confidence) / ((C - 1) K), for C candidates and K looks before the exact one.

    Bonferroni over who leads and when. The best candidate can be lost only by a wrong comparison of itself with one of
    the C - 1 others, whichever leads, at one of K looks; comparisons between two others cannot lose it. So K (C - 1)
    statements have to hold together, though who leads is known only from the data. Infinite where 1 - confidence
    vanishes in float64.
    """
    share = (1 - confidence) / (max(candidates - 1, 1) * max(inexact_looks, 1))
    return -NormalDist().inv_cdf(share) if share > 0 else math.inf


def upper_bounds(
    differences: Sequence[Tensor], sizes: Sequence[int], scale: Sequence[float], z: float
) -> tuple[Tensor, Tensor]:
    """Mean and upper confidence bound of (candidate - leader) on the full validation data, each float64 (C,).

        mean  = 1/T sum_t a_t mean_i d_ti
        bound = mean + z sqrt(1/T^2 sum_t a_t^2 (1 - n_t / N_t) q_t / n_t),   q_t = mean_i d_ti^2

    differences: for each of T tasks (C, n_t), paired, on n_t of its N_t = sizes[t] examples drawn without
    replacement. scale: a_t, the worth of a unit of the task's score. A normal approximation; 1 - n / N is the
    correction for a finite population: at n_t = N_t the mean is exact and the bound is the mean. q_t is taken about
    zero, as in McNemar's test, and not about the mean: it is never smaller than the variance, and it does not vanish
    where a few examples all differ by the same.
    """
    tasks = len(sizes)
    mean = torch.stack([a * d.mean(1) for a, d in zip(scale, differences, strict=True)]).sum(0) / tasks
    variance = torch.zeros_like(mean)
    for d, size, a in zip(differences, sizes, scale, strict=True):
        n = d.shape[1]
        variance += (a / tasks) ** 2 * (1 - n / size) / n * d.square().mean(1)
    if not variance.any():
        return mean, mean
    return mean, mean + torch.where(variance > 0, z * variance.sqrt(), 0.0)


def check_confidence(confidence: float) -> None:
    """Raise DeltaflError unless 0 < confidence < 1."""
    if not 0 < confidence < 1:
        raise DeltaflError(f"confidence: {confidence:g} is not between 0 and 1; a usual value is 0.95")


def race(
    judge: Judge,
    candidates: int,
    sizes: Sequence[int],
    scale: Sequence[float],
    *,
    confidence: float = 0.95,
    seed: int = 0,
    on_finish: Callable[[int, Finish], None] = lambda candidate, finish: None,
) -> list[Finish]:
    """Evaluate `candidates` (at least 1) on growing subsets; after each look drop those with an upper bound below 0.

    A candidate's value is the mean over tasks of scale[t] * mean score. The leader is the candidate with the highest
    mean so far, the first of equal ones; it is never dropped, nor is one whose scores equal the leader's. Those that
    are left see all N_t = sizes[t] examples of each task. With `confidence` (see `critical_value`, `upper_bounds` for
    what is approximate) the candidate that is best on the full data is among them. A score that is not a number drops
    its candidate at once: its mean over all examples is none either.

    Raises:
        DeltaflError: confidence is not between 0 and 1, or a task has no examples.
    """
    check_confidence(confidence)
    if min(sizes) < 1:
        raise DeltaflError("a task has no validation examples; a search needs at least one of each task")
    drawn, plan = orders(sizes, seed), looks(sizes)
    z = critical_value(confidence, candidates, len(plan) - 1)
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
        lost = _lost([seen[c] for c in alive], sizes, scale, z)
        for candidate, gone in zip(alive, lost, strict=True):
            if gone:
                finish(candidate, look)
        alive = [c for c, gone in zip(alive, lost, strict=True) if not gone]
    for candidate in alive:
        finish(candidate, None)
    return [finished[c] for c in range(candidates)]


def _lost(seen: Sequence[Sequence[Tensor]], sizes: Sequence[int], scale: Sequence[float], z: float) -> list[bool]:
    """Which candidates cannot win any more."""
    stacks = [torch.stack([s[task] for s in seen]).double() for task in range(len(sizes))]
    values = torch.stack([a * s.mean(1) for a, s in zip(scale, stacks, strict=True)]).sum(0)
    broken = values.isnan()
    leader = int(values.masked_fill(broken, -math.inf).argmax())
    _, upper = upper_bounds([s - s[leader] for s in stacks], sizes, scale, z)
    lost = (upper < -ROUNDING) | broken
    lost[leader] = False
    return lost.tolist()
