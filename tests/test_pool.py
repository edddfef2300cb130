"""Forked processes: results in order, the same bits, errors as in one process, nobody left behind."""

import errno
import mmap
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from tqdm import tqdm

from checkpoint_files import fails
from deltafl import forking
from deltafl.errors import DeltaflError
from deltafl.forking import can_fork
from deltafl.pool import AHEAD, Pool, shared_like

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="the system cannot fork")


@pytest.fixture(autouse=True)
def nothing_left():
    """After every test: no child process, and no more open files than before."""
    before = {*os.listdir("/proc/self/fd")}
    yield
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)
    assert before.issuperset(os.listdir("/proc/self/fd"))


def mapped(work, items, workers: int, **options) -> list:
    with Pool(work, workers, **options) as pool:
        return list(pool.map(items))


@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize(
    "items", [[], [1], [("a", 0), {"n": 1}], range(100), [bytes(3_000_000)] * 6]
)
def test_items_of_any_kind_and_results_of_any_size_come_in_order(workers: int, items) -> None:
    """A pool serves many calls; a socket takes items of 64 KiB, so that long ones go by number."""
    items = list(items)
    with Pool(lambda number: (items[number], os.getpid()), workers) as pool:
        for _ in range(2):
            results = list(pool.map(range(len(items))))
            assert [item for item, _ in results] == items
            assert (os.getpid() in {pid for _, pid in results}) == (workers == 1 and items != [])


@pytest.mark.parametrize("workers", [1, 3])
def test_work_has_one_thread_and_gives_the_same_bits(workers: int) -> None:
    a = torch.randn(300, 300, generator=torch.Generator().manual_seed(0))
    before = torch.get_num_threads()
    results = mapped(lambda i: (torch.get_num_threads(), (a * i) @ a), range(5), workers)
    assert [threads for threads, _ in results] == [1] * 5
    assert torch.get_num_threads() == before
    torch.set_num_threads(1)
    try:
        assert all(torch.equal(t, (a * i) @ a) for i, (_, t) in enumerate(results))
    finally:
        torch.set_num_threads(before)


def test_work_is_shared_by_who_is_free() -> None:
    """Who has the long item does few others."""

    def work(number: int) -> int:
        if number == 0:
            time.sleep(0.3)
        return os.getpid()

    pids = mapped(work, range(2 * AHEAD), 2)
    assert pids.count(pids[0]) < AHEAD


def test_nothing_runs_once_it_is_left(tmp_path: Path) -> None:
    def work(number: int) -> None:
        while number:
            (tmp_path / str(time.monotonic_ns())).touch()

    with Pool(work, 2) as pool:
        next(pool.map(range(3)))
    before = len(list(tmp_path.iterdir()))
    time.sleep(0.05)
    assert len(list(tmp_path.iterdir())) == before


TENSORS = {
    "float": torch.randn(3, 5), "half": torch.randn(7).half(), "scalar": torch.tensor(3),
    "empty": torch.empty(0, 2), "turned": torch.randn(4, 6).T, "bools": torch.tensor([True, False]),
}  # fmt: skip


@pytest.mark.parametrize("like", [[], [torch.zeros(25)], TENSORS.values()])
def test_tensors_of_any_kind_come_back_and_known_objects_are_the_same(like) -> None:
    known = {"w": torch.zeros(2)}

    def work(factor: int) -> tuple[dict[str, torch.Tensor], object, str]:
        return {n: (t * factor).to(t.dtype) for n, t in TENSORS.items()}, known, "word"

    with Pool(work, 2, slots=3, like=like, known=[known]) as pool:
        for call in range(2):
            factors = [call, call + 1, call + 2, call + 3]  # one more than slots
            for factor, (back, same, word) in zip(factors, pool.map(factors), strict=True):
                assert same is known
                assert word == "word"
                for name, tensor in TENSORS.items():
                    want = (tensor * factor).to(tensor.dtype)
                    assert torch.equal(back[name], want)
                    assert back[name].dtype == want.dtype


def test_processes_see_what_is_written_into_shared_memory() -> None:
    shared = shared_like({"a": torch.zeros(4), "b": torch.zeros(2, dtype=torch.float64)})
    with Pool(lambda factor: {n: t * factor for n, t in shared.items()}, 3) as pool:
        for number in (1.0, 2.0):
            for tensor in shared.values():
                tensor.fill_(number)
            for factor, back in enumerate(pool.map(range(5))):
                assert all((t == factor * number).all() for t in back.values())


def test_the_memory_that_a_process_needs_is_told() -> None:
    def work(size: int) -> int:  # new pages, not what the process has freed
        return mmap.mmap(-1, size).write(bytes(size))

    with Pool(work, 2) as pool:
        list(pool.map([50_000_000] * 4))
        assert len(pool.memory) <= 2
        assert max(pool.memory.values()) > 40_000_000


class OddError(Exception):
    """Cannot be made from its arguments."""

    def __init__(self, one: int, two: int) -> None:
        super().__init__(f"{one} and {two}")


def fail(error: Exception) -> None:
    raise error


ALIKE = {
    lambda: fail(DeltaflError("one", "two")): (DeltaflError, "1. one\n  2. two"),
    lambda: fail(OSError(errno.ENOSPC, "full")): (OSError, "[Errno 28] full"),
    lambda: fail(KeyError("x")): (KeyError, "'x'"),
}
FORKED = {
    lambda: fail(OddError(1, 2)): (RuntimeError, "OddError: 1 and 2"),
    lambda: lambda: None: (Exception, "pickle"),
    lambda: os.kill(os.getpid(), signal.SIGKILL): (DeltaflError, "ended early (signal SIGKILL), "),
    lambda: os._exit(7): (DeltaflError, "ended early (exit code 7), perhaps for want of memory"),
}


@pytest.mark.parametrize(
    ("workers", "third", "kind", "words"),
    [(1, *row) for row in ((k, *v) for k, v in ALIKE.items())]
    + [(2, *row) for row in ((k, *v) for k, v in {**ALIKE, **FORKED}.items())],
)
def test_whatever_ends_the_work_reaches_the_caller(workers: int, third, kind, words: str) -> None:
    with pytest.raises(kind) as caught:
        mapped(lambda number: third() if number == 3 else number, range(50), workers)
    assert words in str(caught.value)


def test_of_several_errors_the_first_in_order_is_raised_in_its_turn() -> None:
    def work(number: int) -> int:
        if number == 4:
            time.sleep(0.2)
        if number >= 4:
            raise ValueError(number)
        return number

    with Pool(work, 3) as pool:
        results = pool.map(range(30))
        assert [next(results) for _ in range(4)] == [0, 1, 2, 3]
        with pytest.raises(ValueError, match="4"):
            next(results)
        fails("the worker processes have ended", lambda: next(pool.map(range(3))))


def test_an_interrupt_is_left_to_the_parent() -> None:
    def work(number: int) -> str:
        os.kill(os.getpid(), signal.SIGINT)
        return "went on"

    assert mapped(work, range(2), 2) == ["went on"] * 2


KILLED = """
import os, sys, time
from deltafl.pool import Pool

def work(number):
    time.sleep(0.01)
    return os.getpid()

for pid in Pool(work, 2).map(range(10**6)):
    print(pid, flush=True)
"""


def test_when_the_parent_is_killed_the_others_end() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", KILLED], stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout
        pids = {int(parent.stdout.readline()) for _ in range(20)}
        parent.kill()
        parent.stdout.read()  # to the end: whoever could write has gone
    patience = time.monotonic() + 30
    while any(running(pid) for pid in pids) and time.monotonic() < patience:
        time.sleep(0.01)
    assert not any(running(pid) for pid in pids)


def running(pid: int) -> bool:
    """False too for one that has ended and that nobody has waited for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_thread_beside_or_another_system_is_a_reason_not_to_fork(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(forking.threading, "active_count", lambda: 1)
    monkeypatch.setattr(forking.sys, "platform", "linux")
    assert can_fork()
    monkeypatch.setattr(forking.sys, "platform", "darwin")
    assert not can_fork()
    monkeypatch.undo()
    stop = threading.Event()
    beside = threading.Thread(target=stop.wait)
    beside.start()
    assert not can_fork()
    stop.set()
    beside.join()


def test_the_thread_of_tqdms_bars_is_no_reason() -> None:
    interval = tqdm.monitor_interval
    tqdm.monitor_interval = 10
    try:
        with tqdm(total=1, disable=True):
            assert threading.active_count() > 1
        assert can_fork()
    finally:
        tqdm.monitor_interval = interval
