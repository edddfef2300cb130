"""One pass over tensors: the units of work that it is cut into, and who does them."""

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import TypeAlias, TypeVar

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


def chunks(specs: Mapping[str, Spec], *, whole: bool = False) -> Iterator[list[Piece]]:
    """The blocks of all tensors in order, in units of about `CHUNK` elements.

    whole: all blocks of a tensor are in one unit.
    """
    unit: list[Piece] = []
    size = 0
    for name, spec in specs.items():
        for start, stop in blocks(spec.numel):
            unit.append((name, start, stop))
            size += stop - start
            if size >= CHUNK and (stop == spec.numel or not whole):
                yield unit
                unit, size = [], 0
    if unit:
        yield unit


def visit(
    specs: Mapping[str, Spec],
    work: Callable[[Unit], T],
    threads: int = 1,
    *,
    whole: bool = False,
    name: str = "",
    width: int = 4,
    on_progress: OnProgress = ignore,
) -> Generator[T, None, None]:
    """What `work` gives for every unit, in order, a few units ahead of who consumes it.

    By `threads` forked processes, where forking is safe and all tensors are on the CPU, else by
    this one: `work` changes nothing but shared memory, and its results can be pickled. Each uses
    one core, so that torch splits no operation and the result does not depend on their number.
    Progress counts `width` bytes for each element under `name`.
    """
    units = list(chunks(specs, whole=whole))
    forks = can_fork() and all(spec.device.type == "cpu" for spec in specs.values())
    done, total = 0, width * sum(spec.numel for spec in specs.values())

    def work_on(number: int) -> T:
        return work(units[number])

    with Pool(work_on, min(threads, len(units)) if forks else 1) as pool:
        for unit, result in zip(units, pool.map(range(len(units))), strict=True):
            yield result
            done += width * sum(stop - start for _, start, stop in unit)
            on_progress(Progress(name, done, total, {"unit": "bytes"}))
