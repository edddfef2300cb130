"""The bars: what they show, and that they start no thread, which would keep others from forking."""

import io
import sys
import threading
from pathlib import Path

import pytest

from deltafl.cli.progress import drawn_progress
from deltafl.progress import Progress, ignore


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_bar_shows_counts_and_numbers_without_a_thread(monkeypatch: pytest.MonkeyPatch):
    stderr = Terminal()
    monkeypatch.setattr(sys, "stderr", stderr)
    monkeypatch.setenv("COLUMNS", "160")
    before = threading.active_count()
    with drawn_progress() as show:
        for done in range(1, 4):
            show(Progress("steps", done, 3, {"loss": 1 / done, "lr": "1e-4"}))
        show(Progress("merging", 2_000_000, 4_000_000, {"unit": "bytes"}))
        show(Progress("merging", 4_000_000, 4_000_000, {"unit": "bytes"}))
        assert threading.active_count() == before
    assert "3/3, loss 0.3333, lr 1e-4" in stderr.getvalue()
    assert "4.0 MB/4.0 MB" in stderr.getvalue()


@pytest.mark.parametrize("quiet", [True, False])
def test_nothing_is_drawn_when_quiet_or_off_a_terminal(quiet: bool, tmp_path: Path):
    with (tmp_path / "log").open("w") as file, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stderr", Terminal() if quiet else file)
        if quiet:
            patch.setattr(sys, "stdout", None)
        with drawn_progress() as show:
            assert show is ignore
