"""Forked processes: results in order, errors as in one process, nobody left behind."""

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from deltafl.algebra import processes
from deltafl.algebra.processes import AHEAD, can_fork, forked
from deltafl.errors import DeltaflError

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="the system cannot fork")


@pytest.fixture(autouse=True)
def nothing_left():
    """After every test: no child process, and no more open files than before."""
    before = sorted(os.listdir("/proc/self/fd"))
    yield
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)
    assert sorted(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("count", [0, 1, 2, 100])
def test_results_come_in_order_from_other_processes(workers: int, count: int) -> None:
    results = list(forked(lambda number: (number * number, os.getpid()), count, workers))
    assert [square for square, _ in results] == [number * number for number in range(count)]
    assert os.getpid() not in {pid for _, pid in results}


def test_work_is_shared_by_who_is_free() -> None:
    """Who has the long unit does few others."""

    def work(number: int) -> int:
        if number == 0:
            time.sleep(0.3)
        return os.getpid()

    pids = list(forked(work, 2 * AHEAD, 2))
    assert pids.count(pids[0]) < AHEAD


def test_results_larger_than_a_pipe_do_not_block() -> None:
    results = list(forked(lambda number: bytes([number]) * 3_000_000, 6, 2))
    assert results == [bytes([number]) * 3_000_000 for number in range(6)]


def test_no_more_units_than_promised_are_ahead_of_the_consumer(tmp_path: Path) -> None:
    results = forked(lambda number: (tmp_path / str(number)).touch(), 100, 2)
    next(results)
    time.sleep(0.2)
    assert len(list(tmp_path.iterdir())) <= 2 * AHEAD
    results.close()


def test_nothing_runs_once_it_is_left(tmp_path: Path) -> None:
    def work(number: int) -> None:
        while number:
            (tmp_path / str(time.monotonic_ns())).touch()

    results = forked(work, 3, 2)
    next(results)
    results.close()
    before = len(list(tmp_path.iterdir()))
    time.sleep(0.05)
    assert len(list(tmp_path.iterdir())) == before


class OddError(Exception):
    """Cannot be made from its arguments."""

    def __init__(self, one: int, two: int) -> None:
        super().__init__(f"{one} and {two}")


@pytest.mark.parametrize(
    ("error", "same"),
    [
        (DeltaflError("one", "two"), lambda e: e.problems == ("one", "two")),
        (OSError(errno.ENOSPC, "No space left on device"), lambda e: e.errno == errno.ENOSPC),
        (KeyError("x"), lambda e: e.args == ("x",)),
    ],
)
def test_errors_reach_the_caller_whole(error: Exception, same) -> None:
    def work(number: int) -> int:
        if number == 3:
            raise error
        return number

    with pytest.raises(type(error)) as caught:
        list(forked(work, 9, 2))
    assert same(caught.value)


def test_of_several_errors_the_first_in_order_is_raised_in_its_turn() -> None:
    def work(number: int) -> int:
        if number == 4:
            time.sleep(0.2)
        if number >= 4:
            raise ValueError(number)
        return number

    results = forked(work, 30, 3)
    assert [next(results) for _ in range(4)] == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="4"):
        next(results)


def test_an_error_that_cannot_be_pickled_is_told_with_its_traceback() -> None:
    def work(number: int) -> int:
        raise OddError(1, 2)

    with pytest.raises(RuntimeError, match=r"(?s)in a worker process:.*in work.*OddError: 1 and 2"):
        list(forked(work, 9, 2))


def test_a_result_that_cannot_be_pickled_is_an_error() -> None:
    with pytest.raises(Exception, match="pickle"):
        list(forked(lambda number: lambda: None, 2, 2))


@pytest.mark.parametrize("end", [lambda: os.kill(os.getpid(), signal.SIGKILL), lambda: os._exit(7)])
def test_a_process_that_is_killed_is_one_clear_error(end) -> None:
    def work(number: int) -> int:
        if number == 3:
            end()
        return number

    with pytest.raises(
        DeltaflError,
        match=r"ended early \((signal SIGKILL|exit code 7)\), perhaps .* fewer processes",
    ):
        list(forked(work, 50, 2))


def test_begin_runs_once_in_each_process() -> None:
    begun = []
    counts = list(forked(lambda number: len(begun), 20, 2, begin=lambda: begun.append(1)))
    assert (counts, begun) == ([1] * 20, [])


def test_an_interrupt_is_left_to_the_parent() -> None:
    def work(number: int) -> str:
        os.kill(os.getpid(), signal.SIGINT)
        return "went on"

    assert list(forked(work, 2, 2)) == ["went on"] * 2


KILLED = """
import os, sys, time
from deltafl.algebra.processes import forked

def work(number):
    time.sleep(0.01)
    return os.getpid()

for pid in forked(work, 10**6, 2):
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


def test_a_thread_beside_is_a_reason_not_to_fork(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes.sys, "platform", "linux")
    monkeypatch.setattr(processes.threading, "active_count", lambda: 1)
    assert can_fork()
    monkeypatch.undo()
    stop = threading.Event()
    beside = threading.Thread(target=stop.wait)
    beside.start()
    assert not can_fork()
    stop.set()
    beside.join()


def test_a_system_other_than_linux_uses_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes.threading, "active_count", lambda: 1)
    monkeypatch.setattr(processes.sys, "platform", "darwin")
    assert not can_fork()
