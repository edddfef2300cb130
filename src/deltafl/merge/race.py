"""Race candidates over shared, growing subsets; drop one once a bound says that it cannot win.

A race knows of candidates only what `judge` tells: scores, example by example. All candidates see
the same examples, so that two are compared by paired differences: what is common to all scores of
an example (how hard it is, the -3 of a log-likelihood) does not count, and what is left varies far
less.
"""

import math
from collections.abc import Callable, Sequence
from itertools import compress
from statistics import NormalDist

import torch
from torch import Tensor

from deltafl.errors import DeltaflError
from deltafl.seeding import keyed_generator

FIRST = 8
"""Examples of each task at the first look; every further look adds half as many again."""

ROUNDING = 1e-12
"""Sums of equal worth may differ by this much in float64; no candidate is dropped for it."""

Judge = Callable[[Sequence[int], int], Sequence[Tensor]]
"""(candidates, look) -> of each task their scores, (candidates, examples seen by that look)."""


def orders(sizes: Sequence[int], seed: int) -> list[Tensor]:
    """For each task the random order in which all candidates see its examples, int64 (N_t,)."""
    return [
        torch.randperm(size, generator=keyed_generator(seed, "racing", task, size))
        for task, size in enumerate(sizes)
    ]


def looks(sizes: Sequence[int], first: int = FIRST) -> list[list[int]]:
    """Examples of each task seen by each look: first, half as many again, and so on; then all."""
    found, count = [], first
    while count < max(sizes):
        found.append([min(count, size) for size in sizes])
        count = max(count + 1, count * 3 // 2)
    return [*found, list(sizes)]


def critical_value(confidence: float, inexact_looks: int) -> float:
    """z with 1 - Phi(z) = (1 - confidence) / (K (K - 1) / 2), for K looks before the exact one.

    The leader after look j is compared with everyone at each later look k, by examples drawn after
    it was chosen. Given the first j looks it is one fixed candidate, so the best candidate takes
    part in a single comparison for each pair j < k: Bonferroni over pairs of looks holds for any
    number of candidates, though who leads is known only from the data. Infinite at confidence 1.

    Raises:
        DeltaflError: confidence is not between 0 and 1.
    """
    if not 0 < confidence < 1:
        raise DeltaflError(f"confidence: {confidence:g} is not between 0 and 1; 0.95 is usual")
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
        v_t   = ((N_t - k_t) / N_t)^2 (1 - f_t / (N_t - k_t)) q_t / f_t
        q_t   = the larger of the mean of all n_t d_ti^2 and that of the last f_t

    differences: for each of T tasks (C, n_t), paired, on n_t of its N_t = sizes[t] examples drawn
    without replacement. known: k_t, how many of them, the first, were seen when the leader was
    chosen: they count as they are, and the f_t = n_t - k_t others estimate the rest. scale: a_t,
    the worth of a unit of the task's score.

    A normal approximation with the correction for a finite population: at n_t = N_t the bound is
    the mean. Squares are taken about zero, as in McNemar's test: that is not below the variance, it
    does not vanish where a few examples differ by the same, and it makes the mean a self-normalised
    sum. Of normal differences such a sum has lighter tails than the normal law at any n, and of
    symmetric ones, however heavy their tails, those of a sub-Gaussian (Efron 1969). The last f_t
    count alone too because the leader may lead for having been spared its rare losses in the first
    k_t. What no bound can know is a gain on rare examples of which none was drawn yet.
    """
    mean = torch.zeros(len(differences[0]), dtype=torch.float64)
    variance = torch.zeros_like(mean)
    for d, k, size, a in zip(differences, known, sizes, scale, strict=True):
        old, new, rest = d[:, :k].sum(1), d[:, k:], size - k
        if not (count := new.shape[1]):
            mean += a * old / size
            continue
        squares = torch.maximum(d.square().mean(1), new.square().mean(1))
        mean += a * (old + rest * new.mean(1)) / size
        variance += (a * rest / size) ** 2 * (1 - count / rest) / count * squares
    return (mean + torch.where(variance > 0, z * variance.sqrt(), 0.0)) / len(sizes)


def race(
    judge: Judge,
    candidates: int,
    plan: Sequence[Sequence[int]],
    scale: Sequence[float],
    confidence: float = 0.95,
) -> list[int | None]:
    """For each candidate the look, from 1, after which it was dropped; None: it saw all examples.

    A candidate's value is the mean over tasks of scale[t] * mean score. The leader after a look is
    the candidate with the highest mean so far, the first of equal ones; neither it nor an equal one
    is dropped then. At every later look all are compared with it by the examples seen since (see
    `critical_value`, and `upper_bounds` for what is approximate). With `confidence` the candidate
    that is best on all data is among those that are left. A score that is not a finite number drops
    its candidate at once: its mean over all examples is none either.

    plan: examples of each task seen by each look (see `looks`); the last sees all.

    Raises:
        DeltaflError: a task has no examples; confidence is not between 0 and 1.
    """
    sizes = plan[-1]
    if min(sizes) < 1:
        raise DeltaflError("a task has no validation examples; a search needs one of each task")
    z = critical_value(confidence, len(plan) - 1)
    dropped: list[int | None] = [None] * candidates
    alive, leaders = list(range(candidates)), list[tuple[int, Sequence[int]]]()
    for look, counts in enumerate(plan):
        seen = [scores.double() for scores in judge(alive, look)]
        if look == len(plan) - 1:
            break
        parts = [a * s.mean(1) for a, s in zip(scale, seen, strict=True)]
        values = torch.stack(parts).sum(0).nan_to_num(-math.inf, -math.inf, -math.inf)
        behind = values.isinf()
        for leader, known in leaders:
            if leader in alive:
                differences = [s - s[alive.index(leader)] for s in seen]
                behind |= upper_bounds(differences, known, sizes, scale, z) < -ROUNDING
        first = int(values.argmax())  # of equal ones the first
        behind &= (values != values[first]) | values.isinf()
        behind[first] = False
        leaders.append((alive[first], counts))
        for candidate in compress(alive, behind.tolist()):
            dropped[candidate] = look + 1
        alive = list(compress(alive, (~behind).tolist()))
    return dropped
