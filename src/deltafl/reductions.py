"""Reductions over whole deltas in one streaming pass each: the Gram matrix, and exact magnitude thresholds."""

import math
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from deltafl.streaming import OnElements, Piece, chunks, ignore, in_order, length

BINS = 1 << 21

AT_ONCE = 1 << 20
"""Elements up to which magnitudes are held together and selected without a histogram."""


class BlockRows(Protocol):
    """n deltas that are read block by block."""

    names: tuple[str, ...]

    def shape(self, name: str) -> tuple[int, ...]: ...

    def row(self, i: int, name: str, start: int, stop: int) -> Tensor: ...

    def block(self, name: str, start: int, stop: int) -> Tensor: ...

    def refuse_nonfinite(self, name: str, start: int, stop: int) -> None: ...

    @property
    def updates(self) -> Sequence[object]: ...


def sizes_of(rows: BlockRows) -> list[tuple[str, int]]:
    """(name, number of elements) of each tensor."""
    return [(name, math.prod(rows.shape(name))) for name in rows.names]


def gram_matrix(rows: BlockRows, threads: int = 1, on_elements: OnElements = ignore) -> Tensor:
    """G_ij = <delta_i, delta_j> over all tensors, (n, n) float64; blocks are summed in order. Raises on NaN and Inf."""

    def partial(group: list[Piece]) -> Tensor:
        total = torch.zeros(n, n, dtype=torch.float64)
        for name, start, stop in group:
            block = rows.block(name, start, stop).double()
            part = (block @ block.T).cpu()
            if not torch.isfinite(part).all():
                rows.refuse_nonfinite(name, start, stop)
            total += part
        return total

    n = len(rows.updates)
    gram = torch.zeros(n, n, dtype=torch.float64)
    groups = list(chunks(sizes_of(rows)))
    for group, part in zip(groups, in_order(partial, groups, threads), strict=True):
        gram += part
        on_elements(n * length(group))
    return (gram + gram.T) / 2


def magnitude_thresholds(
    rows: BlockRows, density: float, per_tensor: bool, threads: int = 1, on_elements: OnElements = ignore
) -> tuple[dict[str, list[float]], list[float]]:
    """The magnitude of the k-th largest element, k = round(density * size), exactly, in bounded memory.

    Returns tensor -> n thresholds, and the fraction of each delta that is >= its threshold: values equal to it are
    all kept, so that can be more than `density`. Magnitudes are compared as float32. k = 0: threshold infinite.
    """
    sizes = sizes_of(rows)
    groups = [[s] for s in sizes] if per_tensor else [sizes]
    thresholds: dict[str, list[float]] = {name: [] for name, _ in sizes}
    kept = [0] * len(rows.updates)
    for i in range(len(rows.updates)):
        for group in groups:
            numel = sum(size for _, size in group)
            value, count = kth_magnitude(rows, i, group, round(density * numel), threads)
            on_elements(numel)
            kept[i] += count
            for name, _ in group:
                thresholds[name].append(value)
    total = max(1, sum(size for _, size in sizes))
    return thresholds, [count / total for count in kept]


def kth_magnitude(rows: BlockRows, i: int, sizes: Sequence[tuple[str, int]], k: int, threads: int) -> tuple[float, int]:
    """(k-th largest magnitude of delta i over these tensors, number of elements >= it).

    The bits of a non-negative float32, read as an integer, have its order. Each pass counts what lies above a range
    of bit patterns and takes a histogram inside it; the range comes from a sample first, and shrinks until one bin is
    one value. Almost always one pass.
    """
    if k <= 0:
        return math.inf, 0
    groups = list(chunks(sizes))
    numel = sum(size for _, size in sizes)
    if numel <= AT_ONCE:
        bits = torch.cat([magnitude_bits(rows.row(i, *piece)) for group in groups for piece in group])
        value = bits.kthvalue(numel - k + 1).values
        return float_of(int(value)), int((bits >= value).sum())
    low, high = sampled_range(rows, i, groups, k / numel)
    while True:
        shift = max(0, (high - low - 1).bit_length() - (BINS.bit_length() - 1))

        def count(group: list[Piece], low: int = low, high: int = high, shift: int = shift) -> tuple[int, Tensor]:
            above, bins = 0, torch.zeros(((high - low - 1) >> shift) + 1, dtype=torch.int64)
            for name, start, stop in group:
                bits = magnitude_bits(rows.row(i, name, start, stop))
                over = int((bits >= high).sum())
                inside = bits[(bits >= low) & (bits < high)]
                above += over
                if len(inside):
                    bins += torch.bincount((inside - low) >> shift, minlength=len(bins))
            return above, bins

        above, bins = 0, None
        for over, part in in_order(count, groups, threads):
            above += over
            bins = part if bins is None else bins.add_(part)
        assert bins is not None
        reached = above + bins.flip(0).cumsum(0)
        place = int(torch.searchsorted(reached, k))
        if above >= k or place == len(bins):
            low, high = (high, INFINITY_BITS + 1) if above >= k else (0, low)
            continue
        start = low + ((len(bins) - 1 - place) << shift)
        if shift == 0:
            return float_of(start), int(reached[place])
        low, high = start, min(high, start + (1 << shift))


INFINITY_BITS = 0x7F800000


def magnitude_bits(row: Tensor) -> Tensor:
    """int32 whose order is that of the magnitudes in float32; NaN counts as infinite."""
    return (row.float().view(torch.int32) & 0x7FFFFFFF).clamp_max_(INFINITY_BITS)


def float_of(bits: int) -> float:
    """The float32 that has these bits."""
    return float(torch.tensor(bits, dtype=torch.int32).view(torch.float32))


def sampled_range(rows: BlockRows, i: int, groups: Sequence[list[Piece]], fraction: float) -> tuple[int, int]:
    """A range of bit patterns that very likely holds the (1 - fraction) quantile, from a fixed subset of blocks.

    Only the time depends on the guess, not the result.
    """
    pieces = [piece for group in groups for piece in group]
    step = max(1, len(pieces) // 64)
    sample = torch.cat([magnitude_bits(rows.row(i, *piece)) for piece in pieces[::step]]).sort().values
    n, place = len(sample), (1 - fraction) * len(sample)
    margin = 0.02 * n + 8 if step > 1 else 1
    low, high = sample[max(0, int(place - margin))], sample[min(n - 1, int(place + margin))]
    return int(low), int(high) + 1
