"""Work in forked processes: each has an interpreter's lock of its own, so that cores do not wait for one another."""

import contextlib
import ctypes
import os
import pickle
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Generator
from multiprocessing.connection import Connection, Pipe, wait
from typing import Any, TypeVar

from deltafl.errors import DeltaflError

T = TypeVar("T")

TICKET = 4
"""Bytes of one ticket, the number of a unit of work: few, so that one read takes it whole."""

AHEAD = 4
"""Units of work for each process that may be ahead of the consumer."""


def can_fork() -> bool:
    """Whether a fork is safe here: Linux, and no other Python thread that could hold a lock meanwhile."""
    return sys.platform == "linux" and threading.active_count() == 1


def forked(
    work: Callable[[int], T], count: int, workers: int, begin: Callable[[], None] = lambda: None
) -> Generator[T, None, None]:
    """work(0) .. work(count - 1), in order, by forked processes; `begin` is called first in each.

    Who is free takes the next ticket from one pipe; results return pickled through a pipe of each process's own. What
    `work` changes in memory is lost. When the generator is left, or this process is killed, no process is left.

    Raises:
        DeltaflError: a process was killed. Else what `work` raises for the first unit for which it does.
    """
    tickets_out, tickets_in = os.pipe()
    children: dict[Connection, int] = {}
    try:
        for _ in range(workers):
            mine, theirs = Pipe(duplex=False)
            child = fork()
            if not child:
                os.close(tickets_in)
                for other in (mine, *children):
                    other.close()
                _serve(work, begin, tickets_out, theirs)
            theirs.close()
            children[mine] = child
        os.close(tickets_out)
        tickets_out = -1
        given, held = 0, {}
        for wanted in range(count):
            while given < min(count, wanted + AHEAD * workers):
                os.write(tickets_in, given.to_bytes(TICKET, "little"))
                given += 1
            while wanted not in held:
                for connection in wait(list(children)):
                    number, *outcome = _receive(connection, children)  # type: ignore[arg-type]
                    held[number] = outcome
            result, error = held.pop(wanted)
            if error is not None:
                raise error
            yield result
    finally:
        for handle in (tickets_out, tickets_in):
            if handle >= 0:
                os.close(handle)
        for connection, child in children.items():
            if child:
                os.kill(child, signal.SIGKILL)  # all results are here, or nobody wants them
                os.waitpid(child, 0)
            connection.close()


def fork() -> int:
    """As os.fork; the child ignores interrupts: the parent is interrupted too, and ends it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    parent = os.getpid()
    try:
        with warnings.catch_warnings():
            # Python 3.12 warns of any thread, of OpenMP and OpenBLAS too: those are idle, and not used after the fork.
            warnings.simplefilter("ignore", DeprecationWarning)
            child = os.fork()
        if not child:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            _end_with_parent(parent)
        return child
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end_with_parent(parent: int) -> None:
    """Let Linux kill this process when its parent dies, however that dies (prctl, PR_SET_PDEATHSIG)."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _receive(
    connection: Connection, children: dict[Connection, int]
) -> tuple[int, Any, BaseException | None]:
    """Number, result and error of a unit of work. Raises DeltaflError if the process ended without a word."""
    try:
        return pickle.loads(connection.recv_bytes())
    except (EOFError, OSError):
        status = os.waitstatus_to_exitcode(os.waitpid(children[connection], 0)[1])
        children[connection] = 0
        how = f"signal {signal.Signals(-status).name}" if status < 0 else f"exit code {status}"
        raise DeltaflError(
            f"a worker process ended early ({how}), perhaps for want of memory; free some, or use fewer processes"
        ) from None


def _serve(
    work: Callable[[int], Any], begin: Callable[[], None], tickets: int, results: Connection
) -> None:
    """The life of a forked process: work on tickets until there are no more. Never returns."""
    with contextlib.suppress(BaseException):  # nobody listens any more
        begin()
        while ticket := os.read(tickets, TICKET):
            number = int.from_bytes(ticket, "little")
            try:
                data = pickle.dumps((number, work(number), None), pickle.HIGHEST_PROTOCOL)
            except BaseException as error:
                data = pickle.dumps((number, None, portable(error)))
            results.send_bytes(data)
    os._exit(1)


def portable(error: BaseException) -> BaseException:
    """`error` with its traceback as a note, for another process to raise; if it cannot be pickled, a RuntimeError that
    tells the same.
    """
    told = "in a worker process:\n" + "".join(traceback.format_exception(error))
    error.add_note(told)
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # whatever a user's own class raises
        return RuntimeError(told)
    return error
