"""The order in which tensors are visited, and the few threads or processes that visit them."""

from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeAlias, TypeVar

import torch

from deltafl.algebra.tensors import blocks
from deltafl.forking import can_fork
from deltafl.pool import Pool

G = TypeVar("G")
T = TypeVar("T")

CHUNK = 1 << 21
"""Elements in one unit of work for a thread or process."""

Piece: TypeAlias = tuple[str, int, int]
"""Tensor, first flat element, last + 1."""

OnElements: TypeAlias = Callable[[int], None]
"""Told how many more elements have been read, for a progress bar."""


def ignore(count: int) -> None:
    """The `OnElements` that shows nothing."""


def length(group: Sequence[Piece]) -> int:
    """Elements in a group of blocks."""
    return sum(stop - start for _, start, stop in group)


def chunks(
    sizes: Sequence[tuple[str, int]], chunk: int = CHUNK, *, whole: bool = False
) -> Iterator[list[Piece]]:
    """Blocks (name, start, stop) of all tensors in order, in units of about `chunk` elements.

    whole: all blocks of a tensor are in one unit.
    """
    group: list[Piece] = []
    held = 0
    for name, numel in sizes:
        for start, stop in blocks(numel):
            group.append((name, start, stop))
            held += stop - start
            if held >= chunk and (stop == numel or not whole):
                yield group
                group, held = [], 0
    if group:
        yield group


def _keep_freed_memory() -> None:
    """Free one large piece: glibc then keeps freed blocks for the next ones instead of returning them to the system.

    Every block would otherwise come as page faults, up to half of the time of a merge. Nothing is touched here.
    """
    torch.empty(8 << 20, dtype=torch.uint8)


def _one_thread() -> None:
    torch.set_num_threads(1)


def in_order(
    work: Callable[[G], T], groups: Sequence[G], threads: int, *, processes: bool = False
) -> Generator[T, None, None]:
    """`work` of each group, in order, by a few threads that use one core each.

    One core for each: torch then splits no operation, and the result does not depend on the number of threads. Few
    groups are ahead of the consumer, so results do not pile up.

    processes: `work` changes nothing in memory, its results can be pickled, and it computes on the CPU. Forked
    processes then take the place of the threads, which lose a third of their time to the interpreter's lock, where
    that is safe.
    """
    workers = min(threads, len(groups))
    if processes and workers > 1 and can_fork():
        _keep_freed_memory()
        with Pool(lambda number: work(groups[number]), workers) as pool:
            yield from pool.map(range(len(groups)))
        return
    mine = torch.get_num_threads()
    _keep_freed_memory()
    pool = ThreadPoolExecutor(threads, initializer=_one_thread)
    try:
        waiting = [pool.submit(work, g) for g in groups[: 2 * threads]]
        for following in range(len(waiting), len(groups) + len(waiting)):
            future = waiting.pop(0)
            if following < len(groups):
                waiting.append(pool.submit(work, groups[following]))
            yield future.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        torch.set_num_threads(mine)
