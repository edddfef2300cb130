"""A fork that is safe and leaves nobody behind; for what begins before torch is imported too."""

import ctypes
import os
import signal
import sys
import threading
import warnings


def can_fork() -> bool:
    """Whether a fork is safe here: Linux, and no other Python thread that could hold a lock.

    The thread with which tqdm watches bars, shown or not, is ended: a download leaves it behind.
    """
    if bars := sys.modules.get("tqdm"):
        bars.tqdm.monitor_interval = 0
        for thread in threading.enumerate():
            if isinstance(thread, bars.TMonitor):  # each subclass of tqdm has its own
                bars.TMonitor.exit(thread)
    return sys.platform == "linux" and threading.active_count() == 1


def fork() -> int:
    """As os.fork; the child ignores interrupts, and Linux kills it when its parent dies."""
    parent = os.getpid()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        with warnings.catch_warnings():
            # Python 3.12 warns of any thread, of OpenMP's too: the child does not use those.
            warnings.simplefilter("ignore", DeprecationWarning)
            child = os.fork()
        if not child:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
            if os.getppid() != parent:
                os._exit(1)
        return child
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
