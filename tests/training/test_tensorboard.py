"""Event files against the record that they come from."""

import sys
from pathlib import Path

import pytest

from deltafl.errors import DeltaflError
from deltafl.training import tensorboard
from deltafl.training.record import RunRecord

ROWS = [
    {"event": "start", "round": 0, "val_score": 0.25},
    {
        "event": "round",
        "round": 1,
        "clients": [3, 1],
        "loss": 1.5,
        "val_score": None,
        "ok": True,
    },
    {
        "event": "round",
        "round": 2,
        "clients": [0, 2],
        "loss": 0.75,
        "val_score": 0.5,
        "bytes_up": 2**24,
    },
]


def run(folder: Path, rows: list[dict]) -> Path:
    record = RunRecord.create(folder, {"seed": 0})
    for row in rows:
        record.append(row)
    return folder


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Read with TensorBoard's own reader."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    held = EventAccumulator(str(folder))
    held.Reload()
    return {
        name: [(e.step, e.value) for e in held.Scalars(name)] for name in held.Tags()["scalars"]
    }


def test_every_number_of_the_record_is_there_at_its_round(tmp_path: Path):
    pytest.importorskip("tensorboard")
    folder = run(tmp_path / "run", ROWS)
    expected = {
        "val_score": [(0, 0.25), (2, 0.5)],
        "loss": [(1, 1.5), (2, 0.75)],
        "bytes_up": [(2, float(2**24))],
    }
    for _ in range(2):  # a second call replaces the first one's files
        metrics = tensorboard.write_scalars(folder)
        assert metrics == folder / "metrics"
        assert len(list(metrics.iterdir())) == 1
        assert scalars(metrics) == expected


def test_epochs_go_before_steps(tmp_path: Path):
    pytest.importorskip("tensorboard")
    folder = run(tmp_path / "run", [{"event": "epoch", "epoch": 3, "step": 90, "lr": 0.5}])
    assert scalars(tensorboard.write_scalars(folder)) == {"step": [(3, 90.0)], "lr": [(3, 0.5)]}


def test_a_folder_without_a_record_stays_as_it_is(tmp_path: Path):
    pytest.importorskip("tensorboard")
    with pytest.raises(DeltaflError, match="run directory"):
        tensorboard.write_scalars(tmp_path)
    assert not list(tmp_path.iterdir())


def test_without_the_package_one_line_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    folder = run(tmp_path / "run", ROWS)
    with pytest.raises(DeltaflError, match=r'pip install "deltafl\[tensorboard\]"'):
        tensorboard.write_scalars(folder)
    assert not (folder / "metrics").exists()
