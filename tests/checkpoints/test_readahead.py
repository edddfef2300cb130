"""Reading ahead is a hint: it touches what it is told to, within its budget, and never fails aloud."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from deltafl.checkpoints import readahead
from deltafl.checkpoints.readahead import STEP, TURN, reading_ahead

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux reads ahead")


@pytest.fixture
def advised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[tuple[str, int]]]:
    """What the kernel is asked for: file name, offset."""
    log = tmp_path / "log"
    log.touch()

    def advise(handle: int, at: int, length: int, kind: int) -> None:
        assert (length, kind) == (STEP, os.POSIX_FADV_WILLNEED)
        with log.open("a") as file:
            file.write(f"{Path(os.readlink(f'/proc/self/fd/{handle}')).name} {at}\n")

    monkeypatch.setattr(os, "posix_fadvise", advise)
    monkeypatch.setattr(readahead, "can_fork", lambda: True)
    return lambda: [(name, int(at)) for name, at in map(str.split, log.read_text().splitlines())]


def run(files: list[Path]) -> None:
    """Read ahead to the end."""
    with reading_ahead(files, 0.5):
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOWAIT)


def sparse(path: Path, size: int) -> Path:
    path.touch()
    os.truncate(path, size)
    return path


def test_files_are_read_in_turns(tmp_path, advised):
    run([sparse(tmp_path / "a", 2 * TURN + 1), sparse(tmp_path / "b", STEP)])
    a = [("a", at) for at in range(0, 2 * TURN + 1, STEP)]
    turn = TURN // STEP
    assert advised() == [*a[:turn], ("b", 0), *a[turn:]]


def test_no_more_than_the_share_of_free_memory_is_asked_for(tmp_path, advised, monkeypatch):
    told = tmp_path / "meminfo"
    told.write_text(f"MemTotal: 24 kB\nMemFree:  9 kB\nMemAvailable:    {4 * STEP // 1024} kB\n")
    monkeypatch.setattr(readahead, "MEMINFO", told)
    run([sparse(tmp_path / "a", 9 * STEP)])
    assert advised() == [("a", 0), ("a", STEP)]


def test_a_file_that_is_gone_is_left_to_whoever_reads_it(tmp_path, advised):
    before = len(os.listdir("/proc/self/fd"))
    run([sparse(tmp_path / "a", 5), tmp_path / "gone"])
    assert len(os.listdir("/proc/self/fd")) == before


def test_it_ends_with_the_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readahead, "can_fork", lambda: True)
    monkeypatch.setattr(os, "posix_fadvise", lambda *arguments: time.sleep(60))
    with reading_ahead([sparse(tmp_path / "a", STEP)]):
        pass
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


PARENT = """
import os, sys, time
from pathlib import Path
from deltafl.checkpoints.readahead import reading_ahead

os.posix_fadvise = lambda *arguments: time.sleep(0.01)
with reading_ahead([Path(sys.argv[1])], 1e6):
    print(flush=True)
    time.sleep(60)
"""


def test_it_ends_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    command = [sys.executable, "-c", PARENT, str(sparse(tmp_path / "a", 10**6 * STEP))]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as parent:
        assert parent.stdout
        parent.stdout.readline()
        parent.kill()
        assert not parent.stdout.read()  # ends when whoever holds the other end has gone
