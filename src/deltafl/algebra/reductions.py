"""Reductions over whole deltas, streamed: the Gram matrix, and exact magnitude thresholds."""

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from typing import TypeAlias, TypeVar

import numpy as np
import torch
from torch import Tensor

from deltafl.algebra.deltas import Deltas
from deltafl.algebra.streaming import Unit, chunks, visit
from deltafl.progress import OnProgress, ignore
from deltafl.rules.ordering import largest
from deltafl.rules.rule import Threshold
from deltafl.rules.weights import PerModel, numbers_of

T = TypeVar("T")

BITS = 18
BINS = 1 << BITS
"""Bins of a histogram of magnitudes."""

SAMPLE = 1 << 18
"""Elements, about, that the first guess of a threshold is made from."""

INFINITY_BITS = 0x7F800000

GROUPS, MOST = 8, 512
"""A model's units are counted in at most so many groups, or in more if they had more than `MOST`
each, for which int32 suffices.
"""

Window: TypeAlias = tuple[int, int]
"""The bit pattern where `BINS` bins begin, and how many low bits they leave out."""

Histogram: TypeAlias = tuple[np.ndarray, np.ndarray]
"""The bins that are not empty, and how many magnitudes are in each; bin `BINS`: all above."""

ALL: Window = (0, 31 - BITS)


def gram_matrix(deltas: Deltas, threads: int = 1, on_progress: OnProgress = ignore) -> Tensor:
    """G_ij = <delta_i, delta_j> over all tensors, (n, n) float64. Raises on NaN and Inf.

    The products of the blocks are added with one rounding: the order of the tensors, which differs
    between a model in memory and its file, does not matter.
    """

    def products(unit: Unit) -> np.ndarray:
        found = []
        for piece in unit:
            block = deltas.stack(*piece).double()
            found.append(torch.stack([block @ row for row in block]).cpu())
            deltas.check_finite(found[-1], *piece)
        return torch.stack(found).numpy()

    n = len(deltas.updates)
    passed = visit(
        deltas.specs,
        products,
        threads,
        whole=deltas.whole,
        name="norms",
        width=4 * n,
        on_progress=on_progress,
    )
    parts = np.concatenate([np.zeros((1, n, n)), *passed])
    sums = [math.fsum(pair) for pair in parts.reshape(-1, n * n).T.tolist()]
    gram = torch.tensor(sums, dtype=torch.float64).reshape(n, n)
    return (gram + gram.T) / 2


def magnitude_thresholds(
    deltas: Deltas,
    density: PerModel,
    per_tensor: bool,
    threads: int = 1,
    on_progress: OnProgress = ignore,
) -> tuple[dict[str, list[Threshold]], list[float]]:
    """What keeps the k = int(density * size), at least 1, largest magnitudes, the first of equals.

    Returns tensor -> n thresholds, and the fraction of each delta that is kept. The order is that
    of names, then of elements. Magnitudes are compared as float32, NaN counts as infinite.
    Density 0: k = 0. `per_tensor` holds a tensor of one delta at a time, otherwise memory does not
    grow with the model.
    """
    specs, n = dict(sorted(deltas.specs.items())), len(deltas.updates)
    size = sum(spec.numel for spec in specs.values())

    def ranks(name: str, numel: int) -> list[int]:
        shares = numbers_of(density, name, n)
        return [max(1, int(d * numel)) if d > 0 and numel else 0 for d in shares]

    def of_each(unit: Unit) -> dict[str, list[Threshold]]:
        numels = {name: specs[name].numel for name, _, _ in unit}
        return {
            name: [
                largest(deltas.stack(name, 0, numel, [i])[0], k)
                for i, k in enumerate(ranks(name, numel))
            ]
            for name, numel in numels.items()
        }

    def passed(work: Callable[[Unit], T]) -> Iterable[T]:
        return visit(
            specs,
            work,
            threads,
            whole=per_tensor or deltas.whole,
            name="thresholds",
            width=4 * n,
            on_progress=on_progress,
        )

    thresholds, begin = dict.fromkeys(specs, [Threshold()] * n), 0
    if per_tensor:
        rows = [ranks(name, spec.numel) for name, spec in specs.items()]
        thresholds |= {name: row for part in passed(of_each) for name, row in part.items()}
        return thresholds, [sum(ks) / max(1, size) for ks in zip(*rows, strict=True)]
    ks = ranks(next(iter(specs), ""), size)
    found = _streamed(deltas, ks, passed)
    for name, spec in specs.items():
        thresholds[name] = [Threshold(value, stop - begin) for value, stop in found]
        begin += spec.numel
    return thresholds, [k / max(1, size) for k in ks]


def _streamed(
    deltas: Deltas,
    ks: Sequence[int],
    passed: Callable[[Callable[[Unit], dict[int, Histogram]]], Iterable[dict[int, Histogram]]],
) -> list[Threshold]:
    """The threshold of the ks[i] largest magnitudes of delta i, all tensors one after the other.

    A pass counts the magnitudes above a window of bit patterns, and those in each bin of it. A
    sample guesses the first window, which is most often right, and its bins single patterns; then
    one pass is enough. A wrong guess is followed by the window of all patterns and that of one of
    its bins. (Two passes by radix, without a guess, make a merge by ties take 1.27 times the CPU
    time.)
    """
    windows, found = _guess(deltas, ks) if any(ks) else {}, dict[int, Threshold]()
    units = list(chunks(dict(sorted(deltas.specs.items())), whole=deltas.whole))
    size = min(MOST, 1 + len(units) // GROUPS)
    groups = [units[at : at + size] for at in range(0, len(units), size)]
    while windows:
        totals = {i: np.zeros((len(groups), BINS + 1), np.int32) for i in windows}
        for number, part in enumerate(passed(functools.partial(_count, deltas, windows))):
            for i, (bins, counts) in part.items():
                totals[i][number // size, bins] += counts
        for i, total in totals.items():
            reached, (low, shift) = total.sum(0)[::-1].cumsum(), windows.pop(i)
            place = int(np.searchsorted(reached, ks[i]))
            low += BINS - place << shift
            if not reached[0] < ks[i] <= reached[-1]:
                windows[i] = ALL
            elif shift:
                windows[i] = low, 0
            else:
                equal = total[:, BINS - place]
                spare = ks[i] - int(reached[place] - equal.sum())
                found[i] = Threshold(_magnitude(low), _stop(deltas, groups, i, low, equal, spare))
    numel = sum(spec.numel for spec in deltas.specs.values())
    return [found.get(i, Threshold(math.inf, numel)) for i in range(len(ks))]


def _stop(
    deltas: Deltas,
    groups: Sequence[Sequence[Unit]],
    i: int,
    bits: int,
    equal: np.ndarray,
    spare: int,
) -> int:
    """One past the `spare`-th of delta i's magnitudes of these bits, of which each group of units
    holds `equal`: only its group is read.
    """
    group = int(np.searchsorted(equal.cumsum(), spare))
    spare -= int(equal[:group].sum())
    place = sum(stop - start for units in groups[:group] for u in units for _, start, stop in u)
    for name, start, stop in chain.from_iterable(groups[group]):
        same = (_magnitude_bits(deltas.stack(name, start, stop, [i])[0]) == bits).nonzero()
        if spare <= len(same):
            return place + int(same[spare - 1]) + 1
        spare -= len(same)
        place += stop - start
    raise AssertionError("the deltas have changed between two passes")


def _count(deltas: Deltas, windows: Mapping[int, Window], unit: Unit) -> dict[int, Histogram]:
    """For each of some deltas how many magnitudes of a unit are where in its window."""
    inside: dict[int, list[np.ndarray]] = {i: [] for i in windows}
    above, found = dict.fromkeys(windows, 0), {}
    for piece in unit:
        rows = _magnitude_bits(deltas.stack(*piece)).cpu().numpy()
        for i, (low, shift) in windows.items():
            above[i] += int(np.count_nonzero(rows[i] >= low + (BINS << shift)))
            offsets = (rows[i] - np.int32(low)).view(np.uint32)
            inside[i].append(offsets[offsets < BINS << shift] >> shift)
    for i, parts in inside.items():
        counts = np.bincount(np.concatenate(parts), minlength=BINS + 1)
        counts[BINS] = above[i]
        bins = counts.nonzero()[0]
        found[i] = bins, counts[bins]
    return found


def _guess(deltas: Deltas, ks: Sequence[int]) -> dict[int, Window]:
    """For each delta with k > 0 a window that very likely holds the threshold.

    From the first elements of every block: only the time depends on the guess, not the result.
    """
    pieces = [piece for unit in chunks(deltas.specs) for piece in unit]
    length = max(1, SAMPLE // len(pieces))
    heads = (deltas.stack(name, a, min(a + length, b)) for name, a, b in pieces)
    rows = torch.cat([_magnitude_bits(head) for head in heads], 1).sort(1).values.cpu()
    total, last = sum(spec.numel for spec in deltas.specs.values()), rows.shape[1] - 1
    windows = {}
    for i, k in enumerate(ks):
        place, margin = (1 - k / total) * last, 0.005 * last + 8
        ends = rows[i, [max(0, int(place - margin)), min(last, int(place + margin))]]
        low, high = ends.tolist()
        windows[i] = low, max(0, (high - low).bit_length() - BITS)
    return {i: window for i, window in windows.items() if ks[i]}


def _magnitude(bits: int) -> float:
    return float(np.int32(bits).view(np.float32))


def _magnitude_bits(rows: Tensor) -> Tensor:
    """int32 whose order is that of the magnitudes in float32; `rows` is overwritten."""
    return rows.abs_().float().view(torch.int32).clamp_max_(INFINITY_BITS)
