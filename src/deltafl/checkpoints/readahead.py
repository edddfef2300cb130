"""Ask the kernel for files before they are needed, while the heavy imports run."""

import contextlib
import itertools
import os
import re
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path

from deltafl.forking import can_fork, fork

STEP = 1 << 17
"""Bytes asked for at once: Linux reads no more of one call than a disk's readahead setting."""

TURN = 1 << 24
"""Bytes of one file before it is the next one's turn."""

AHEAD = 64
"""Steps that may be under way: they keep a disk busy, and others' reads need not wait."""

MEMINFO = Path("/proc/meminfo")


@contextlib.contextmanager
def reading_ahead(files: Sequence[Path], share: float = 0.5) -> Iterator[None]:
    """Meanwhile, a process reads the files into the page cache, up to a share of free memory.

    Without it a merge of files that are not in the cache takes 1.9 times as long (task arithmetic,
    five files of 1 GB, two cores, medians of six turns).

    A process and not a thread, so that what follows can fork; made before torch is imported, it
    costs little. It ends when it is done, with the block, or with the process that made it.
    """
    if not can_fork():
        yield
        return
    budget = int(share * _available())
    child = fork()
    if not child:
        try:
            _advise(files, budget)
        finally:
            os._exit(0)
    try:
        yield
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def _advise(files: Sequence[Path], budget: int) -> None:
    """Ask for the files, a step at a time, few steps ahead of what has arrived."""
    with contextlib.suppress(OSError):  # only a hint: who reads meets the error
        sizes = {os.open(file, os.O_RDONLY): file.stat().st_size for file in files}
        steps = list(itertools.islice(_steps(sizes), budget // STEP))
        for arrived, (handle, at) in enumerate(steps, -AHEAD):
            os.posix_fadvise(handle, at, STEP, os.POSIX_FADV_WILLNEED)
            if arrived >= 0:
                handle, at = steps[arrived]
                os.pread(handle, 1, min(at + STEP, sizes[handle]) - 1)


def _steps(sizes: dict[int, int]) -> Iterator[tuple[int, int]]:
    """(file, offset) of all steps: a turn of each file, the next turn of each, ..."""
    for turn in range(0, max(sizes.values(), default=0), TURN):
        for handle, size in sizes.items():
            for at in range(turn, min(turn + TURN, size), STEP):
                yield handle, at


def _available() -> int:
    """Bytes of memory that programs can still have: free, or with nothing but cached files."""
    found = re.search(r"MemAvailable:\s*(\d+)", MEMINFO.read_text())
    return 1024 * int(found[1]) if found else 0
