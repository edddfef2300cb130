"""Means, spreads and intervals of a handful of runs."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from scipy import stats


@dataclass(frozen=True)
class Summary:
    """Mean, sample standard deviation (None for one value), number of values."""

    mean: float
    spread: float | None
    runs: int


def summary(values: Sequence[float]) -> Summary:
    """Of at least one value."""
    spread = statistics.stdev(values) if len(values) > 1 else None
    return Summary(statistics.mean(values), spread, len(values))


def by_seed(points: Sequence[Mapping[str, Any]], key: str) -> list[float]:
    """The mean of `key` over the points of each seed."""
    seeds = dict.fromkeys(point["seed"] for point in points)
    return [statistics.mean(p[key] for p in points if p["seed"] == seed) for seed in seeds]


def interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float] | None:
    """Student's t interval of the mean: mean -+ t_{n-1} s / sqrt(n). None for fewer than two values."""
    if len(values) < 2:
        return None
    low, high = stats.t.interval(
        confidence, len(values) - 1, statistics.mean(values), stats.sem(values) or 1e-300
    )
    return float(low), float(high)


def gains(values: Sequence[float]) -> dict[str, float | None]:
    """gain (the mean), low and high (its interval); all None where there are no values."""
    low, high = interval(values) or (None, None)
    return {"gain": summary(values).mean if values else None, "low": low, "high": high}


def correlation(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Pearson's r; None where one of the two does not vary, or there are fewer than three points."""
    if len(x) < 3 or len(set(x)) == 1 or len(set(y)) == 1:
        return None
    return statistics.correlation(x, y)
