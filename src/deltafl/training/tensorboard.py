"""A run's record as TensorBoard event files."""

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from deltafl.errors import DeltaflError
from deltafl.training.record import RunRecord

METRICS = "metrics"
STEPS = ("round", "epoch", "step")
"""What a row is placed by: the first of these that it has."""


def check_installed() -> None:
    """Raise DeltaflError unless event files can be written; call it before hours of training, not
    after.
    """
    if find_spec("tensorboard") is None:
        raise DeltaflError(
            'tensorboard is not installed; pip install "deltafl[tensorboard]", '
            "or leave out --tensorboard"
        )


def write_scalars(folder: str | Path) -> Path:
    """Every number in the rows of RUN/record.jsonl, by its name, into RUN/metrics: `tensorboard
    --logdir RUN`.

    Event files of an earlier call are replaced. Texts, lists and truth values are left out. Returns
    RUN/metrics.

    Raises:
        DeltaflError: no record there, or tensorboard is not installed.
    """
    check_installed()
    return write_rows(RunRecord(folder).rows(), Path(folder) / METRICS)


def write_rows(rows: Sequence[Mapping[str, Any]], metrics: Path) -> Path:
    """Every number in `rows`, by its name, into event files in the folder `metrics`, in place of
    older ones.
    """
    from torch.utils.tensorboard import SummaryWriter

    for old in metrics.glob("events.out.tfevents.*"):
        old.unlink()
    with SummaryWriter(str(metrics)) as writer:
        for row in rows:
            by = next((key for key in STEPS if key in row), None)
            for name, value in _numbers(row):
                if name != by:
                    writer.add_scalar(name, value, None if by is None else row[by])
    return metrics


def _numbers(row: Mapping[str, Any]) -> list[tuple[str, float]]:
    return [
        (k, float(v))
        for k, v in row.items()
        if isinstance(v, int | float) and not isinstance(v, bool)
    ]
