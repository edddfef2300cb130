"""Means, spreads and intervals of a handful of runs."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Summary:
    """Mean, sample standard deviation (None for one value), number of values."""

    mean: float
    spread: float | None
    runs: int


def summary(values: Sequence[float]) -> Summary:
    """Of at least one value."""
    return Summary(
        statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None, len(values)
    )


def by_seed(points: Sequence[Mapping[str, Any]], key: str) -> list[float]:
    """The mean of `key` over the points of each seed."""
    seeds = dict.fromkeys(point["seed"] for point in points)
    return [statistics.mean(p[key] for p in points if p["seed"] == seed) for seed in seeds]


def interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float] | None:
    """Student's t interval of the mean: mean -+ t_{n-1} s / sqrt(n). None for fewer than two values."""
    from scipy.stats import t

    if len(values) < 2:
        return None
    half = (
        float(t.ppf((1 + confidence) / 2, len(values) - 1))
        * statistics.stdev(values)
        / len(values) ** 0.5
    )
    return statistics.mean(values) - half, statistics.mean(values) + half


def gained(gains: Sequence[float], *, told: bool) -> dict[str, float | None]:
    """gain (the mean), low and high (its interval); all None where a gain says nothing."""
    low, high = (interval(gains) if told else None) or (None, None)
    return {"gain": summary(gains).mean if told else None, "low": low, "high": high}


def correlation(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Pearson's r; None where one of the two does not vary, or there are fewer than three points."""
    if len(x) < 3 or len(set(x)) == 1 or len(set(y)) == 1:
        return None
    return statistics.correlation(x, y)
