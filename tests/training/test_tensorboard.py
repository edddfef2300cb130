"""Event files against the rows that they come from."""

import sys
from pathlib import Path

import pytest

from checkpoint_files import fails
from deltafl.training import tensorboard

ROWS = [
    {"event": "start", "round": 0, "val_score": 0.25},
    {"round": 1, "clients": [3, 1], "loss": 1.5, "val_score": None, "ok": True},
    {"round": 2, "clients": [0, 2], "loss": 0.75, "val_score": 0.5, "bytes_up": 2**24},
    {"event": "epoch", "epoch": 3, "step": 90, "lr": 0.5},
]


def test_every_number_of_a_row_is_there_at_its_round_or_epoch(tmp_path: Path):
    """Read with TensorBoard's own reader."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for _ in range(2):  # a second call replaces the first one's files
        tensorboard.write_rows(ROWS, tmp_path / "metrics")
        assert len(list((tmp_path / "metrics").iterdir())) == 1
    held = EventAccumulator(str(tmp_path / "metrics"))
    held.Reload()
    found = {n: [(e.step, e.value) for e in held.Scalars(n)] for n in held.Tags()["scalars"]}
    assert found == {
        "val_score": [(0, 0.25), (2, 0.5)],
        "loss": [(1, 1.5), (2, 0.75)],
        "bytes_up": [(2, float(2**24))],
        "step": [(3, 90.0)],
        "lr": [(3, 0.5)],
    }


def test_without_the_package_one_line_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    fails(r'pip install "deltafl\[tensorboard\]"', tensorboard.check_installed)
