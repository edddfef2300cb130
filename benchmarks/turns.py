"""Contenders measured in turns, and the ratios of their turns."""

import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median

import torch


def seconds(function: Callable[[], object]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def in_turns(
    contenders: Mapping[str, Callable[[], object]], repeats: int
) -> dict[str, list[float]]:
    """Seconds of every contender in every turn; each turn starts with another; two turns beforehand do not count."""
    names = list(contenders)
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(-2, repeats):
        for i in range(len(names)):
            name = names[(turn + i) % len(names)]
            took = seconds(contenders[name])
            if turn >= 0:
                times[name].append(took)
    return times


def ratios(times: Mapping[str, Sequence[float]], over: str, under: str) -> list[float]:
    """over / under in each turn."""
    return [a / b for a, b in zip(times[over], times[under], strict=True)]


def spread(values: Sequence[float], digits: int = 3) -> str:
    """Median and, in brackets, the quartiles."""
    low, high = torch.tensor(values, dtype=torch.float64).quantile(
        torch.tensor([0.25, 0.75], dtype=torch.float64)
    )
    return f"{median(values):.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"
