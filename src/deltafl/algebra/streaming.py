"""One pass over tensors: the units of work that it is cut into, and who does them."""

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeAlias, TypeVar

import torch

from deltafl.algebra.tensors import Spec, blocks
from deltafl.forking import can_fork
from deltafl.pool import Pool
from deltafl.progress import OnProgress, Progress, ignore

T = TypeVar("T")

CHUNK = 1 << 21
"""Elements in one unit of work."""

Piece: TypeAlias = tuple[str, int, int]
"""Tensor, first flat element, last + 1: one block."""

Unit: TypeAlias = Sequence[Piece]


def chunks(
    specs: Mapping[str, Spec], chunk: int = CHUNK, *, whole: bool = False
) -> Iterator[list[Piece]]:
    """The blocks of all tensors in order, in units of about `chunk` elements.

    whole: all blocks of a tensor are in one unit.
    """
    unit: list[Piece] = []
    size = 0
    for name, spec in specs.items():
        for start, stop in blocks(spec.numel):
            unit.append((name, start, stop))
            size += stop - start
            if size >= chunk and (stop == spec.numel or not whole):
                yield unit
                unit, size = [], 0
    if unit:
        yield unit


def visit(
    specs: Mapping[str, Spec],
    work: Callable[[Unit], T],
    threads: int = 1,
    *,
    forks: bool = True,
    whole: bool = False,
    name: str = "",
    width: int = 4,
    on_progress: OnProgress = ignore,
) -> Generator[tuple[Unit, T], None, None]:
    """Every unit with what `work` gives for it, in order, a few units ahead of who consumes them.

    By `threads` forked processes, where forking is safe, `forks` is allowed (`work` changes nothing
    in memory, and its results can be pickled) and all tensors are on the CPU; else by threads,
    which lose a third of their time to the interpreter's lock. Each uses one core, so that torch
    splits no operation and the result does not depend on their number. Progress counts `width`
    bytes for each element under `name`.
    """
    units = list(chunks(specs, whole=whole))
    workers = min(threads, len(units))
    forks = forks and can_fork() and all(s.device.type == "cpu" for s in specs.values())
    done, total = 0, width * sum(spec.numel for spec in specs.values())

    def work_on(number: int) -> T:
        return work(units[number])

    with Pool(work_on, workers if forks else 1) as pool:
        threaded = workers > 1 and not forks
        results = _threads(work, units, workers) if threaded else pool.map(range(len(units)))
        for unit, result in zip(units, results, strict=True):
            yield unit, result
            done += width * sum(stop - start for _, start, stop in unit)
            on_progress(Progress(name, done, total, {"unit": "bytes"}))


def _threads(work: Callable[[Unit], T], units: Sequence[Unit], threads: int) -> Iterator[T]:
    before = torch.get_num_threads()
    pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
    try:
        waiting = [pool.submit(work, unit) for unit in units[: 2 * threads]]
        for following in range(len(waiting), len(units) + len(waiting)):
            future = waiting.pop(0)
            if following < len(units):
                waiting.append(pool.submit(work, units[following]))
            yield future.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        torch.set_num_threads(before)
