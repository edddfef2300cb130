"""Ask the kernel for files before they are needed, while the heavy imports run."""

import contextlib
import os
import select
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from deltafl.processes import can_fork, fork

STEP = 1 << 24


@contextlib.contextmanager
def reading_ahead(files: Sequence[Path], share: float = 0.5) -> Iterator[None]:
    """Meanwhile, a process of its own reads the files into the page cache, in turns, up to a share of the free memory.

    A process and not a thread, so that what follows can fork; made before torch is imported, it costs little. It ends
    when it is done, with the block, or with the process that made it.
    """
    if not hasattr(os, "posix_fadvise") or not can_fork():
        yield
        return
    budget = int(share * _available())
    life, end = os.pipe()
    child = fork()
    if not child:
        try:
            os.close(end)
            _advise(list(files), budget, lambda: not select.select([life], [], [], 0)[0])
        finally:
            os._exit(0)
    os.close(life)
    try:
        yield
    finally:
        os.close(end)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def _advise(files: Sequence[Path], budget: int, wanted: Callable[[], bool] = lambda: True) -> None:
    """Ask for the files, a step of each in turn, while that is `wanted`."""
    with contextlib.ExitStack() as stack, contextlib.suppress(OSError):  # only a hint: who reads meets the error
        handles = []
        for file in files:
            handles.append(os.open(file, os.O_RDONLY))
            stack.callback(os.close, handles[-1])
        sizes = [os.fstat(h).st_size for h in handles]
        for at in range(0, max(sizes, default=0), STEP):
            for handle, size in zip(handles, sizes, strict=True):
                if at < size and budget > 0 and wanted():
                    os.posix_fadvise(handle, at, STEP, os.POSIX_FADV_WILLNEED)
                    budget -= STEP


def _available() -> int:
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
