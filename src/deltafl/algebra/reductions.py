"""Reductions over whole deltas, streamed: the Gram matrix, and exact magnitude thresholds."""

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from deltafl.algebra.deltas import Deltas
from deltafl.algebra.streaming import Unit, chunks, visit
from deltafl.progress import OnProgress, ignore
from deltafl.rules.weights import PerModel, numbers_of

BINS = 1 << 18
"""Bins of a histogram of magnitudes."""

SAMPLE = 1 << 18
"""Elements, about, that the first guess of a threshold is made from."""

INFINITY_BITS = 0x7F800000


def gram_matrix(deltas: Deltas, threads: int = 1, on_progress: OnProgress = ignore) -> Tensor:
    """G_ij = <delta_i, delta_j> over all tensors, (n, n) float64. Raises on NaN and Inf.

    The products of the blocks are added with one rounding: the order of the tensors, which differs
    between a model in memory and its file, does not matter.
    """

    def products(unit: Unit) -> np.ndarray:
        found = []
        for name, start, stop in unit:
            block = deltas.stack(name, start, stop).double()
            part = torch.stack([block @ row for row in block]).cpu()
            if not math.isfinite(part.sum()):
                deltas.refuse_nonfinite(name, start, stop)
            found.append(part)
        return torch.stack(found).numpy()

    n = len(deltas.updates)
    passed = visit(
        deltas.specs, products, threads, name="norms", width=4 * n, on_progress=on_progress
    )
    parts = np.concatenate([np.zeros((1, n, n)), *(part for _, part in passed)])
    sums = [math.fsum(pair) for pair in parts.reshape(-1, n * n).T.tolist()]
    gram = torch.tensor(sums, dtype=torch.float64).reshape(n, n)
    return (gram + gram.T) / 2


def magnitude_thresholds(
    deltas: Deltas,
    density: PerModel,
    per_tensor: bool,
    threads: int = 1,
    on_progress: OnProgress = ignore,
) -> tuple[dict[str, list[float]], list[float]]:
    """The magnitude of the k-th largest element, k = int(density * size), at least 1, exactly.

    Returns tensor -> n thresholds, and the fraction of each delta that is >= its threshold: values
    equal to it are all kept, so that can be more than `density`. Magnitudes are compared as
    float32, NaN counts as infinite. Density 0: threshold infinite. `per_tensor` holds a tensor of
    one delta at a time, otherwise memory does not grow with the model.
    """
    specs, n = deltas.specs, len(deltas.updates)
    size = sum(spec.numel for spec in specs.values())

    def ranks(name: str, numel: int) -> list[int]:
        shares = numbers_of(density, name, n)
        return [max(1, int(d * numel)) if d > 0 and numel else 0 for d in shares]

    passed = functools.partial(
        visit, specs, threads=threads, whole=per_tensor, name="thresholds", width=4 * n,
        on_progress=on_progress,
    )  # fmt: skip
    found = {name: [NOTHING] * n for name in specs}
    if per_tensor:

        def of_each(unit: Unit) -> dict[str, list[Found]]:
            numels = {name: specs[name].numel for name, _, _ in unit}
            return {name: _held(deltas, name, ranks(name, k)) for name, k in numels.items()}

        for _, part in passed(of_each):
            found |= part
        kept = [sum(row[i][1] for row in found.values()) for i in range(n)]
    else:
        one = _streamed(deltas, ranks(next(iter(specs), ""), size), passed)
        found, kept = dict.fromkeys(specs, one), [count for _, count in one]
    thresholds = {name: [value for value, _ in row] for name, row in found.items()}
    return thresholds, [count / max(1, size) for count in kept]


Found: TypeAlias = tuple[float, int]
"""A magnitude, and how many are not below it."""

NOTHING: Found = (math.inf, 0)


def _held(deltas: Deltas, name: str, ks: Sequence[int]) -> list[Found]:
    """The ks[i]-th largest magnitude of one tensor of delta i."""
    found, numel = [], deltas.specs[name].numel
    for i, k in enumerate(ks):
        bits = _magnitude_bits(deltas.stack(name, 0, numel, [i])[0])
        value = bits.kthvalue(numel - k + 1).values if k else 0
        found.append((_float(int(value)), int((bits >= value).sum())) if k else NOTHING)
    return found


def _streamed(
    deltas: Deltas, ks: Sequence[int], passed: Callable[..., Iterable[tuple[Unit, Any]]]
) -> list[Found]:
    """The ks[i]-th largest magnitude of delta i over all tensors.

    A pass counts the magnitudes above a window of bit patterns, and those in each bin of it. A
    sample guesses the first window, which is most often right, and its bins single patterns; then
    one pass is enough. A wrong guess is followed by the window of all patterns and that of one of
    its bins. (Two passes by radix, without a guess, make a merge by ties take 1.27 times the CPU
    time.)
    """
    windows = _guess(deltas, ks) if any(ks) else []
    found = {i: NOTHING for i, k in enumerate(ks) if not k}
    while pending := [i for i in range(len(ks)) if i not in found]:

        def count(unit: Unit) -> list[tuple[int, np.ndarray, np.ndarray]]:
            above, inside = [0] * len(ks), [[] for _ in ks]
            for piece in unit:
                rows = _magnitude_bits(deltas.stack(*piece)).cpu().numpy()
                for i in pending:
                    low, high = windows[i]
                    above[i] += int(np.count_nonzero(rows[i] >= high))
                    offsets = (rows[i] - np.int32(low)).view(np.uint32)
                    inside[i].append(offsets[offsets < high - low] >> _shift(windows[i]))
            counts = [np.bincount(np.concatenate(inside[i])) for i in pending]
            bins = [np.flatnonzero(row) for row in counts]
            return [(above[i], b, c[b]) for i, b, c in zip(pending, bins, counts, strict=True)]

        above, counts = np.zeros(len(pending), np.int64), np.zeros((len(pending), BINS), np.int64)
        for _, parts in passed(count):
            for at, (more, bins, part) in enumerate(parts):
                above[at] += more
                counts[at, bins] += part
        for i, more, row in zip(pending, above, counts, strict=True):
            reached = more + row[::-1].cumsum()
            place, shift = int(np.searchsorted(reached, ks[i])), _shift(windows[i])
            low = windows[i][0] + (BINS - 1 - place << shift)
            if not more < ks[i] <= reached[-1]:
                windows[i] = 0, INFINITY_BITS + 1
            elif shift:
                windows[i] = low, low + (1 << shift)
            else:
                found[i] = _float(low), int(reached[place])
    return [found[i] for i in range(len(ks))]


def _guess(deltas: Deltas, ks: Sequence[int]) -> list[tuple[int, int]]:
    """For each delta a window [low, high) of bit patterns that very likely holds the threshold.

    From the first elements of every block: only the time depends on the guess, not the result.
    """
    pieces = [piece for unit in chunks(deltas.specs) for piece in unit]
    length = max(1, SAMPLE // len(pieces))
    heads = (deltas.stack(name, a, min(a + length, b)) for name, a, b in pieces)
    rows = torch.cat([_magnitude_bits(head) for head in heads], 1).sort(1).values.cpu()
    total, last = sum(spec.numel for spec in deltas.specs.values()), rows.shape[1] - 1
    windows = []
    for row, k in zip(rows, ks, strict=True):
        place, margin = (1 - k / total) * last, 0.005 * last + 8
        low, high = row[max(0, int(place - margin))], row[min(last, int(place + margin))]
        windows.append((int(low), int(high) + 1))
    return windows


def _shift(window: tuple[int, int]) -> int:
    """How many low bits the bins of a window leave out."""
    return max(0, (window[1] - window[0] - 1).bit_length() - (BINS.bit_length() - 1))


def _magnitude_bits(rows: Tensor) -> Tensor:
    """int32 whose order is that of the magnitudes in float32; `rows` is overwritten."""
    return rows.abs_().float().view(torch.int32).clamp_max_(INFINITY_BITS)


def _float(bits: int) -> float:
    return float(np.array([bits], dtype=np.int32).view(np.float32)[0])
