"""Reductions over whole deltas in one streaming pass each: the Gram matrix, and exact magnitude thresholds."""

import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from deltafl.algebra.deltas import Deltas
from deltafl.algebra.streaming import OnElements, Piece, chunks, ignore, in_order, length
from deltafl.rules.weights import PerModel, numbers_of

BINS = 1 << 21
"""Bins of a histogram at most; only those that count something take memory."""

AT_ONCE = 1 << 20
"""Elements up to which magnitudes are held together and selected without a histogram."""

SAMPLE = 1 << 18
"""Elements that the first guess of a threshold is made from, about."""


def sizes_of(rows: Deltas) -> list[tuple[str, int]]:
    """(name, number of elements) of each tensor."""
    return [(name, rows.spec(name).numel) for name in rows.names]


def on_cpu(rows: Deltas) -> bool:
    """Whether forked processes can compute the blocks."""
    return all(rows.spec(name).device.type == "cpu" for name in rows.names)


def gram_matrix(rows: Deltas, threads: int = 1, on_elements: OnElements = ignore) -> Tensor:
    """G_ij = <delta_i, delta_j> over all tensors, (n, n) float64. Raises on NaN and Inf.

    The products of the blocks are added with one rounding: the order of the tensors, which differs between a model in
    memory and its file, does not matter.
    """

    def products(group: list[Piece]) -> "np.ndarray[Any, np.dtype[np.float64]]":
        found = []
        for name, start, stop in group:
            block = rows.stack(name, start, stop).double()
            part = torch.stack([block @ row for row in block]).cpu()
            if not math.isfinite(part.sum()):
                rows.refuse_nonfinite(name, start, stop)
            found.append(part)
        return torch.stack(found).numpy()

    n = len(rows.updates)
    parts = [np.zeros((1, n, n))]
    groups = list(chunks(sizes_of(rows)))
    found = in_order(products, groups, threads, processes=on_cpu(rows))
    for group, part in zip(groups, found, strict=True):
        parts.append(part)
        on_elements(n * length(group))
    sums = [math.fsum(pair) for pair in np.concatenate(parts).reshape(-1, n * n).T.tolist()]
    gram = torch.tensor(sums, dtype=torch.float64).reshape(n, n)
    return (gram + gram.T) / 2


def magnitude_thresholds(
    rows: Deltas,
    density: PerModel,
    per_tensor: bool,
    threads: int = 1,
    on_elements: OnElements = ignore,
) -> tuple[dict[str, list[float]], list[float]]:
    """The magnitude of the k-th largest element, k = int(density * size), at least 1, exactly, in bounded memory.

    Returns tensor -> n thresholds, and the fraction of each delta that is >= its threshold: values equal to it are
    all kept, so that can be more than `density`. Magnitudes are compared as float32. Density 0: threshold infinite.
    """
    sizes = sizes_of(rows)
    groups = [[s] for s in sizes] if per_tensor or not sizes else [sizes]
    thresholds: dict[str, list[float]] = {name: [] for name, _ in sizes}
    kept = [0] * len(rows.updates)
    for group in groups:
        size = sum(size for _, size in group)
        ks = [
            max(1, int(d * size)) if d > 0 else 0
            for d in numbers_of(density, group[0][0], len(kept))
        ]
        for i, (value, count) in enumerate(kth_magnitudes(rows, group, ks, threads, on_elements)):
            kept[i] += count
            for name, _ in group:
                thresholds[name].append(value)
    total = max(1, sum(size for _, size in sizes))
    return thresholds, [count / total for count in kept]


def kth_magnitudes(
    rows: Deltas,
    sizes: Sequence[tuple[str, int]],
    ks: Sequence[int],
    threads: int = 1,
    on_elements: OnElements = ignore,
) -> list[tuple[float, int]]:
    """(k-th largest magnitude over these tensors, number of elements >= it) of each delta, each with a k of its own.

    The bits of a non-negative float32, read as an integer, have its order. Each pass counts what lies above a range
    of bit patterns and takes a histogram inside it; the range comes from a sample first, and shrinks until one bin is
    one value. Almost always one pass, over all deltas at once.
    """
    n, numel, groups = len(rows.updates), sum(size for _, size in sizes), list(chunks(sizes))
    found = dict.fromkeys((i for i, k in enumerate(ks) if k <= 0 or not numel), (math.inf, 0))
    left = [i for i in range(n) if i not in found]
    if not left or numel <= AT_ONCE:
        on_elements(n * numel)
        found |= {i: _select(rows, i, groups, numel - ks[i] + 1) for i in left}
        return [found[i] for i in range(n)]
    processes = on_cpu(rows)
    ranges = in_order(
        lambda i: sampled_range(rows, i, groups, ks[i] / numel), left, threads, processes=processes
    )
    searches = {i: Search(*found) for i, found in zip(left, ranges, strict=True)}
    told = on_elements
    while pending := [(i, s) for i, s in searches.items() if s.found is None]:

        def count(group: list[Piece], pending: list[tuple[int, Search]] = pending) -> list[Counted]:
            seen: list[list[Counted]] = [[] for _ in pending]
            for piece in group:
                bits = magnitude_bits(rows.stack(*piece)).cpu().numpy()
                for (i, search), more in zip(pending, seen, strict=True):
                    more.append(search.count(bits[i]))
            return [
                (sum(above for above, _ in s), np.concatenate([bins for _, bins in s]))
                for s in seen
            ]

        for group, counted in zip(
            groups, in_order(count, groups, threads, processes=processes), strict=True
        ):
            for (_, search), more in zip(pending, counted, strict=True):
                search.add(*more)
            told(n * length(group))
        told = ignore
        for i, search in pending:
            search.narrow(ks[i])
    found |= {i: s.found for i, s in searches.items() if s.found}
    return [found[i] for i in range(n)]


def _select(rows: Deltas, i: int, groups: Sequence[list[Piece]], place: int) -> tuple[float, int]:
    """The magnitude of rank `place` (1: smallest) of one delta, and the number of elements >= it; all at once."""
    bits = torch.cat([magnitude_bits(rows.row(i, *piece)) for group in groups for piece in group])
    value = bits.kthvalue(place).values
    return float_of(int(value)), int((bits >= value).sum())


Counted: TypeAlias = "tuple[int, np.ndarray[Any, np.dtype[np.uint32]]]"
"""Elements above the range, and the bin of each element inside."""


class Search:
    """The bit patterns [low, high) that are thought to hold one delta's k-th largest magnitude, and the counts."""

    def __init__(self, low: int, high: int) -> None:
        self.found: tuple[float, int] | None = None
        self._begin(low, high)

    def _begin(self, low: int, high: int) -> None:
        self._low, self._high, self._above = low, high, 0
        self._shift = max(0, (high - low - 1).bit_length() - (BINS.bit_length() - 1))
        self._bins = np.zeros(((high - low - 1) >> self._shift) + 1, dtype=np.int64)

    def count(self, bits: "np.ndarray[Any, np.dtype[np.int32]]") -> Counted:
        """What a block adds; `bits` is overwritten."""
        above = int(np.count_nonzero(bits >= self._high))
        bits -= np.int32(self._low)
        offsets = bits.view(np.uint32)
        return above, select(offsets, self._high - self._low) >> np.uint32(self._shift)

    def add(self, above: int, bins: "np.ndarray[Any, np.dtype[np.uint32]]") -> None:
        """Add what was counted."""
        self._above += above
        np.add.at(self._bins, bins.astype(np.intp), 1)

    def narrow(self, k: int) -> None:
        """After a pass: the result, or a smaller (if the guess was wrong, another) range for the next one."""
        reached = self._bins[::-1]
        np.cumsum(reached, out=reached)
        place = int(np.searchsorted(reached, k - self._above))
        if self._above >= k:
            self._begin(self._high, INFINITY_BITS + 1)
        elif place == len(reached):
            self._begin(0, self._low)
        else:
            start = self._low + ((len(reached) - 1 - place) << self._shift)
            if self._shift == 0:
                self.found = float_of(start), int(self._above + reached[place])
                del self._bins
            else:
                self._begin(start, min(self._high, start + (1 << self._shift)))


INFINITY_BITS = 0x7F800000


def select(
    values: "np.ndarray[Any, np.dtype[np.uint32]]", limit: int
) -> "np.ndarray[Any, np.dtype[np.uint32]]":
    """The values below `limit`, where they are few: eight are passed over at a time."""
    whole = len(values) // 8 * 8
    found = np.flatnonzero((values[:whole] < limit).view(np.uint64))
    near = np.concatenate([values[:whole].reshape(-1, 8)[found].ravel(), values[whole:]])
    return near[near < limit]


def magnitude_bits(row: Tensor) -> Tensor:
    """int32 whose order is that of the magnitudes in float32; NaN counts as infinite. `row` is overwritten."""
    return row.abs_().float().view(torch.int32).clamp_max_(INFINITY_BITS)


def float_of(bits: int) -> float:
    """The float32 that has these bits."""
    return float(torch.tensor(bits, dtype=torch.int32).view(torch.float32))


def sampled_range(
    rows: Deltas, i: int, groups: Sequence[list[Piece]], fraction: float
) -> tuple[int, int]:
    """A range of bit patterns that very likely holds the (1 - fraction) quantile, from a fixed subset of blocks.

    Only the time depends on the guess, not the result.
    """
    pieces = [piece for group in groups for piece in group]
    chosen = pieces[:: max(1, len(pieces) // 256)]
    stride = max(1, length(chosen) // SAMPLE)
    sample = torch.empty(
        sum(-(-(stop - start) // stride) for _, start, stop in chosen), dtype=torch.int32
    )
    at = 0
    for piece in (
        chosen
    ):  # into one tensor: small ones between the blocks would break the freed memory into pieces
        part = magnitude_bits(rows.row(i, *piece))[::stride]
        sample[at : at + len(part)] = part
        at += len(part)
    sample = sample.sort().values
    n, place = len(sample), (1 - fraction) * len(sample)
    margin = 0.01 * n + 8
    low, high = sample[max(0, int(place - margin))], sample[min(n - 1, int(place + margin))]
    return int(low), int(high) + 1
