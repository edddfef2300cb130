"""Work in forked processes: the one pool of merges, federated clients and studies.

A process has an interpreter's lock and a core of its own. It starts as a copy of this one, so that
`work` may use whatever is in memory; items go to whoever is free, results come back in the order of
the items. Since every process computes with one thread, results are the same bits for any number of
them.
"""

import ctypes
import io
import math
import mmap
import os
import pickle
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, Pipe, wait
from typing import Any, Generic, NoReturn, Self, TypeVar

import torch
from torch import Tensor

from deltafl.errors import DeltaflError
from deltafl.forking import fork

T = TypeVar("T")
R = TypeVar("R")

AHEAD = 4
"""Items for each process that may be ahead of who consumes the results."""

ALIGNMENT = 64

MOST = 1 << 16
"""Bytes of one pickled item at most: items are told through a socket that keeps them whole."""


@contextmanager
def one_thread() -> Iterator[None]:
    """Within the block torch uses one thread: sums then have one order on every machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Pool(Generic[T, R]):
    """`workers` processes that call `work(item)`; with 1 it is called in this process.

    What `work` changes in memory is lost, but for what `shared_like` made before. Items
    and results are pickled, items into at most 64 KiB. like: tensors for which a result of the
    first `slots` items of each call has shared memory: they are not copied on this side, and are
    valid until the next call. Other tensors are pickled. known: objects from before, which
    results refer to instead of holding copies. memory: bytes that each process has needed at most
    beside what it shares, by process id.

    The processes end with the block, with an error, and with this process, however that ends; they
    ignore interrupts, which this process hears too.

    Raises:
        DeltaflError: the processes cannot be started.
    """

    def __init__(
        self,
        work: Callable[[T], R],
        workers: int,
        *,
        slots: int = 0,
        like: Iterable[Tensor] = (),
        known: Sequence[object] = (),
    ) -> None:
        self._work, self._known = work, known
        self.memory: dict[int, int] = {}
        self._children: dict[Connection, int] = {}
        self._alone = workers < 2
        if self._alone:
            return
        room = _room(like)
        self._slots = [_shared(room) for _ in range(slots)]
        self._sockets = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            for _ in range(workers):
                ours, theirs = Pipe(duplex=False)
                child = fork()
                if not child:
                    self._serve(theirs)
                theirs.close()
                self._children[ours] = child
        except OSError as error:
            self.close()
            raise DeltaflError(
                f"cannot start {workers} worker processes ({error}); use fewer"
            ) from None

    def map(self, items: Iterable[T]) -> Iterator[R]:
        """work(item) of every item, in order.

        Raises:
            DeltaflError: a process was killed, or an earlier call ended with an error.
            Whatever `work` raised for the first item for which it did, its traceback in a note.
        """
        if self._alone:
            for item in items:
                with one_thread():
                    result = self._work(item)
                yield result
            return
        if not self._children:
            raise DeltaflError("the worker processes have ended; start again")
        items, sent, answers = list(items), 0, dict[int, tuple[bool, bytes]]()
        try:
            for wanted in range(len(items)):
                while sent < min(len(items), wanted + AHEAD * len(self._children)):
                    self._sockets[0].send(pickle.dumps((sent, items[sent])))
                    sent += 1
                while wanted not in answers:
                    for connection in self._children.keys() & wait(self._children):
                        number, failed, data = self._receive(connection)
                        answers[number] = failed, data
                failed, data = answers.pop(wanted)
                result = _Unpickler(data, self._known, self._slot(wanted)).load()
                if failed:
                    raise result
                yield result
        except BaseException:  # what nobody waits for must not be taken for a later answer
            self.close()
            raise

    def close(self) -> None:
        """End all processes; nobody waits for their results."""
        while self._children:
            connection, child = self._children.popitem()
            connection.close()
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        for end in () if self._alone else self._sockets:
            end.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _serve(self, answers: Connection) -> NoReturn:
        """The life of a process: one item after the other, until it is killed."""
        with suppress(BaseException):  # nobody listens any more
            torch.set_num_threads(1)
            _keep_freed_memory()
            before = _most_memory()
            while True:
                number, item = pickle.loads(self._sockets[1].recv(MOST))
                failed, file = False, io.BytesIO()
                try:
                    _Pickler(file, self._known, self._slot(number)).dump(self._work(item))
                except BaseException as error:
                    failed, file = True, io.BytesIO(pickle.dumps(_portable(error)))
                answers.send((number, failed, file.getvalue(), _most_memory() - before))
        os._exit(1)

    def _receive(self, connection: Connection) -> tuple[int, bool, bytes]:
        """Number of an item, whether it failed, the pickled result or error."""
        try:
            number, failed, data, grown = connection.recv()
        except (EOFError, OSError):
            child = self._children.pop(connection)
            connection.close()
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            how = f"signal {signal.Signals(-status).name}" if status < 0 else f"exit code {status}"
            raise DeltaflError(
                f"a worker process ({child}) ended early ({how}), perhaps for want of memory; "
                "free some, or use fewer processes"
            ) from None
        self.memory[self._children[connection]] = grown
        return number, failed, data

    def _slot(self, number: int) -> Tensor:
        """Where the tensors of a result are."""
        return (
            self._slots[number] if number < len(self._slots) else torch.empty(0, dtype=torch.uint8)
        )


def shared_like(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Zeros in shapes and dtypes of tensors, which processes forked later share.

    Pages that nobody writes to take no room.
    """
    memory, made, start = _shared(_room(tensors.values())), {}, 0
    for name, tensor in tensors.items():
        made[name] = _view(memory, start, tensor.dtype, tensor.shape)
        start += _room([tensor])
    return made


def _shared(num_bytes: int) -> Tensor:
    return torch.frombuffer(mmap.mmap(-1, max(1, num_bytes)), dtype=torch.uint8)


def _room(tensors: Iterable[Tensor]) -> int:
    """Bytes that tensors take, each aligned."""
    return sum(-(-t.nbytes // ALIGNMENT) * ALIGNMENT for t in tensors)


def _view(memory: Tensor, start: int, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    stop = start + math.prod(shape) * dtype.itemsize
    return memory[start:stop].view(dtype).view(shape)


class _Pickler(pickle.Pickler):
    """Puts CPU tensors into shared memory while there is room, and numbers known objects."""

    def __init__(self, file: io.BytesIO, known: Sequence[object], memory: Tensor) -> None:
        super().__init__(file, pickle.HIGHEST_PROTOCOL)
        self._known_objects, self._memory, self._used = known, memory, 0

    def persistent_id(self, obj: object) -> object:
        for number, known in enumerate(self._known_objects):
            if obj is known:
                return number
        if not isinstance(obj, Tensor) or obj.device.type != "cpu":
            return None
        place = self._used, obj.dtype, tuple(obj.shape)
        if self._used + obj.nbytes > len(self._memory):
            return None
        self._used += _room([obj])
        _view(self._memory, *place).copy_(obj.detach())
        return place


class _Unpickler(pickle.Unpickler):
    def __init__(self, data: bytes, known: Sequence[object], memory: Tensor) -> None:
        super().__init__(io.BytesIO(data))
        self._known_objects, self._memory = known, memory

    def persistent_load(self, pid: Any) -> object:
        return self._known_objects[pid] if isinstance(pid, int) else _view(self._memory, *pid)


def _keep_freed_memory() -> None:
    """Tell glibc not to give freed blocks back, for the kernel clears them each time they return.

    Without it a merge of five files of 1 GB, all in the page cache, takes 1.3 times as long.
    """
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        libc.mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD
        libc.mallopt(-3, 1 << 25)  # M_MMAP_THRESHOLD, at most 32 MB


def _most_memory() -> int:
    """Bytes that this process has held at most."""
    import resource  # not on every system

    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _portable(error: BaseException) -> BaseException:
    """`error` with its traceback as a note; a RuntimeError of these words if it cannot travel."""
    words = "in a worker process:\n" + "".join(traceback.format_exception(error))
    error.add_note(words)
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # whatever a user's own class raises
        return RuntimeError(words)
    return error
