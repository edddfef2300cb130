"""Work in forked processes: the one pool of merges, federated clients and studies.

A process has an interpreter's lock and a core of its own. It starts as a copy of this one, so that
`work` may use whatever is in memory; items go to whoever is free, results come back in the order of
the items. Since every process computes with one thread, results are the same bits for any number of
them.
"""

import io
import math
import mmap
import os
import pickle
import signal
import socket
import struct
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, Pipe, wait
from typing import Any, Generic, NoReturn, TypeVar

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

HEADER = struct.Struct("iiq")
"""Of an answer: number of the item, whether it failed, bytes that the process has needed."""


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

    What `work` changes in memory is lost, but for what lies in `SharedMemory` from before. Items
    and results are pickled, items into at most 64 KiB. room: bytes of shared memory for the CPU
    tensors of a result, of the first `slots` items of each call: they are not copied on this side,
    and are valid until the next call. Other tensors are pickled. known: objects from before, which
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
        room: int = 0,
        known: Sequence[object] = (),
    ) -> None:
        self._work, self._known = work, known
        self.memory: dict[int, int] = {}
        self._children: dict[Connection, int] = {}
        self._sockets: tuple[socket.socket, ...] = ()
        self._alone = workers < 2
        if self._alone:
            return
        self._slots = [SharedMemory(room) for _ in range(slots)]
        self._sockets = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            for _ in range(workers):
                self._start()
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
                    data = pickle.dumps((sent, items[sent]))
                    if len(data) > MOST:
                        raise ValueError(f"item {sent} is {len(data)} bytes long, above {MOST}")
                    self._sockets[0].send(data)
                    sent += 1
                while wanted not in answers:
                    ready = wait(self._children.keys())
                    for connection in [c for c in self._children if c in ready]:
                        number, failed, data = self._receive(connection)
                        answers[number] = failed, data
                failed, data = answers.pop(wanted)
                result = self._unpickled(data, wanted)
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
        for end in self._sockets:
            end.close()

    def __enter__(self) -> "Pool[T, R]":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _start(self) -> None:
        ours, theirs = Pipe(duplex=False)
        child = fork()
        if not child:
            self._serve(theirs)
        theirs.close()
        self._children[ours] = child

    def _serve(self, answers: Connection) -> NoReturn:
        """The life of a process: one item after the other, until it is killed."""
        with suppress(BaseException):  # nobody listens any more
            torch.set_num_threads(1)
            before = _most_memory()
            while True:
                number, item = pickle.loads(self._sockets[1].recv(MOST))
                failed = False
                try:
                    data = self._pickled(self._work(item), number)
                except BaseException as error:
                    failed, data = True, pickle.dumps(_portable(error))
                answers.send_bytes(HEADER.pack(number, failed, _most_memory() - before) + data)
        os._exit(1)

    def _receive(self, connection: Connection) -> tuple[int, bool, bytes]:
        try:
            message = connection.recv_bytes()
        except (EOFError, OSError):
            child = self._children.pop(connection)
            connection.close()
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            how = f"signal {signal.Signals(-status).name}" if status < 0 else f"exit code {status}"
            raise DeltaflError(
                f"a worker process ({child}) ended early ({how}), perhaps for want of memory; "
                "free some, or use fewer processes"
            ) from None
        number, failed, grown = HEADER.unpack_from(message)
        self.memory[self._children[connection]] = grown
        return number, bool(failed), message[HEADER.size :]

    def _pickled(self, result: R, number: int) -> bytes:
        names, file = {id(obj): i for i, obj in enumerate(self._known)}, io.BytesIO()
        memory = self._slots[number] if number < len(self._slots) else SharedMemory(0)
        memory.clear()
        _Pickler(file, names, memory).dump(result)
        return file.getvalue()

    def _unpickled(self, data: bytes, number: int) -> Any:
        memory = self._slots[number] if number < len(self._slots) else SharedMemory(0)
        return _Unpickler(io.BytesIO(data), self._known, memory).load()


class SharedMemory:
    """Memory that processes forked later share. Pages that nobody writes to take no room."""

    def __init__(self, num_bytes: int) -> None:
        self._bytes = torch.frombuffer(mmap.mmap(-1, max(1, num_bytes)), dtype=torch.uint8)
        self._used = 0

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copies of tensors in shared memory."""
        memory, copies = cls(cls.room(tensors.values())), {}
        for name, tensor in tensors.items():
            place = memory.put(tensor)
            assert place is not None
            copies[name] = memory.at(*place)
        return copies

    @staticmethod
    def room(tensors: Iterable[Tensor]) -> int:
        """Bytes that tensors take."""
        return sum(-(-t.numel() * t.element_size() // ALIGNMENT) * ALIGNMENT for t in tensors)

    def clear(self) -> None:
        """Make room again; what was put may be overwritten."""
        self._used = 0

    def put(self, tensor: Tensor) -> tuple[int, torch.dtype, tuple[int, ...]] | None:
        """Copy a tensor, whose place is returned; None if there is no room."""
        place = self._used, tensor.dtype, tuple(tensor.shape)
        stop = self._used + tensor.numel() * tensor.element_size()
        if stop > len(self._bytes):
            return None
        self._used = -(-stop // ALIGNMENT) * ALIGNMENT
        self.at(*place).copy_(tensor)
        return place

    def at(self, start: int, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        """The tensor at a place."""
        stop = start + math.prod(shape) * dtype.itemsize
        return self._bytes[start:stop].view(dtype).view(shape)


class _Pickler(pickle.Pickler):
    """Puts CPU tensors into shared memory while there is room, and numbers known objects."""

    def __init__(self, file: io.BytesIO, known: Mapping[int, int], memory: SharedMemory) -> None:
        super().__init__(file, pickle.HIGHEST_PROTOCOL)
        self._known_objects, self._memory = known, memory

    def persistent_id(self, obj: object) -> object:
        if id(obj) in self._known_objects:
            return self._known_objects[id(obj)]
        if isinstance(obj, Tensor) and obj.device.type == "cpu":
            return self._memory.put(obj.detach())
        return None


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, known: Sequence[object], memory: SharedMemory) -> None:
        super().__init__(file)
        self._known_objects, self._memory = known, memory

    def persistent_load(self, pid: Any) -> object:
        return self._known_objects[pid] if isinstance(pid, int) else self._memory.at(*pid)


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
