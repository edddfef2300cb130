"""A run's record as TensorBoard event files."""

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

from deltafl.errors import DeltaflError

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


def write_rows(rows: Sequence[Mapping[str, object]], metrics: Path) -> None:
    """Every number in `rows`, by its name, into event files in the folder `metrics`, in place of
    older ones: `tensorboard --logdir RUN`. Texts, lists and truth values are left out.
    """
    from torch.utils.tensorboard import SummaryWriter

    for old in metrics.glob("events.out.tfevents.*"):
        old.unlink()
    with SummaryWriter(str(metrics)) as writer:
        for row in rows:
            by = next((key for key in STEPS if key in row), "")
            for name, value in row.items():
                if type(value) in (int, float) and name != by:
                    writer.add_scalar(name, value, row.get(by))
