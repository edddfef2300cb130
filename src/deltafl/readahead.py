"""Ask the kernel for files before they are needed, while the heavy imports run."""

import contextlib
import os
import threading
from collections.abc import Sequence
from pathlib import Path

STEP = 1 << 24


def read_ahead(files: Sequence[Path], share: float = 0.5) -> None:
    """Start reading the files into the page cache in the background, in turns, up to a share of the free memory."""
    if not hasattr(os, "posix_fadvise"):
        return
    budget = int(share * _available())
    threading.Thread(target=_advise, args=(list(files), budget), daemon=True).start()


def _advise(files: Sequence[Path], budget: int) -> None:
    with contextlib.ExitStack() as stack, contextlib.suppress(OSError):  # only a hint: who reads meets the error
        handles = []
        for file in files:
            handles.append(os.open(file, os.O_RDONLY))
            stack.callback(os.close, handles[-1])
        sizes = [os.fstat(h).st_size for h in handles]
        for at in range(0, max(sizes, default=0), STEP):
            for handle, size in zip(handles, sizes, strict=True):
                if at < size and budget > 0:
                    os.posix_fadvise(handle, at, STEP, os.POSIX_FADV_WILLNEED)
                    budget -= STEP


def _available() -> int:
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
