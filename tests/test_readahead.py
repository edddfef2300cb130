"""Reading ahead is a hint: it touches what it is told to, within its budget, and never fails aloud."""

import os
import threading
from pathlib import Path

import pytest

from deltafl import readahead
from deltafl.readahead import STEP, read_ahead

needs_fadvise = pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="the system has no posix_fadvise")


@pytest.fixture
def advised(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """What the kernel is asked for: file name, offset."""
    asked: list[tuple[str, int]] = []

    def advise(handle: int, at: int, length: int, kind: int) -> None:
        assert (length, kind) == (STEP, os.POSIX_FADV_WILLNEED)
        asked.append((Path(os.readlink(f"/proc/self/fd/{handle}")).name, at))

    monkeypatch.setattr(os, "posix_fadvise", advise)
    return asked


def run(files: list[Path], share: float = 0.5) -> None:
    before = set(threading.enumerate())
    read_ahead(files, share)
    for thread in set(threading.enumerate()) - before:
        thread.join()


def sparse(path: Path, size: int) -> Path:
    path.touch()
    os.truncate(path, size)
    return path


@needs_fadvise
def test_files_are_read_in_turns(tmp_path: Path, advised: list[tuple[str, int]]) -> None:
    run([sparse(tmp_path / "a", 2 * STEP + 1), sparse(tmp_path / "b", STEP)])
    assert advised == [("a", 0), ("b", 0), ("a", STEP), ("a", 2 * STEP)]


@needs_fadvise
def test_no_more_than_the_share_of_free_memory_is_asked_for(
    tmp_path: Path, advised: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readahead, "_available", lambda: 4 * STEP)
    run([sparse(tmp_path / "a", 9 * STEP)], share=0.5)
    assert advised == [("a", 0), ("a", STEP)]


@needs_fadvise
@pytest.mark.filterwarnings("error")  # a thread that dies warns
def test_a_file_that_is_gone_is_left_to_whoever_reads_it(tmp_path: Path, advised: list[tuple[str, int]]) -> None:
    before = len(os.listdir("/proc/self/fd"))
    run([sparse(tmp_path / "a", 5), tmp_path / "gone"])
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_system_without_the_call_does_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "posix_fadvise", raising=False)
    before = threading.active_count()
    read_ahead([tmp_path / "none"])
    assert threading.active_count() == before
