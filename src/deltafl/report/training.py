"""The page and the figure of `deltafl centralized`: loss and accuracy, epoch by epoch."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from deltafl.report.federated import settings_table
from deltafl.report.marks import mark_chosen, series
from deltafl.report.page import Column, Facts, Figure, Page, Section, Table
from deltafl.report.parts import percent
from deltafl.report.svg import NARROW, WIDE, blank, drawn, to_png, to_svg
from deltafl.report.theme import SERIES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Drawing

Rows = Sequence[Mapping[str, Any]]


def training_page(result: Mapping[str, Any], rows: Rows) -> Page:
    """What came out, the learning curves, every epoch, the settings."""
    start = next((row for row in rows if row["epoch"] == 0), {})
    facts = Facts(
        [
            ("test accuracy, once", percent(result["test_score"])),
            (f"validation, best (epoch {result['best_epoch']})", percent(result["val_score"])),
            ("before the first epoch", percent(start.get("val_score"))),
            ("epochs", str(result["epochs"])),
            ("seconds of training", f"{result['seconds']:.0f}"),
        ]
    )
    sections = [
        Section("What came out", _told(result), [facts]),
        Section("How it learned", "", [_figure(result, rows)]),
        Section("The epochs", "", [epochs_table(rows)]),
        Section("Settings", "", [settings_table(result["config"])]),
    ]
    lead = "Training on all samples in one place: what federated runs of the same model and data are compared with."
    return Page(result["title"], lead, sections)


def training_figure(
    result: Mapping[str, Any], rows: Rows, kind: Literal["svg", "png"] = "png"
) -> bytes:
    """Training loss and validation accuracy by epoch, the best epoch ringed."""

    def draw(width: int) -> "Drawing":
        return _draw(result, rows, width)

    return to_png(draw, WIDE) if kind == "png" else to_svg(draw, WIDE).encode()


def epochs_table(rows: Rows) -> Table:
    """Learning rate, loss, accuracy and seconds of every epoch."""
    columns = [
        Column("epoch", "number", 0),
        Column("learning rate at its end", "significant", 3),
        Column("training loss", "number", 4),
        Column("validation", "percent", 2, best="max"),
        Column("seconds", "number", 1),
    ]
    keys = ("epoch", "lr", "train_loss", "val_score", "seconds")
    cells = [[row.get(key) for key in keys] for row in rows]
    return Table(
        columns, cells, "Every epoch; epoch 0 is the model before training, with its head."
    )


def _told(result: Mapping[str, Any]) -> str:
    early = (
        f", stopped early after {result['config']['patience']} epochs without a gain"
        * result["stopped_early"]
    )
    return (
        f"{result['epochs']} epochs{early}. The epoch was chosen on {result['val_examples']} validation images; the "
        f"{result['test_examples']} test images were used once, for that epoch's model."
    )


def _figure(result: Mapping[str, Any], rows: Rows) -> Figure:
    caption = "Mean training loss of each epoch, and validation accuracy after it; the ring marks the epoch chosen."
    losses = [row["train_loss"] for row in rows if row.get("train_loss") is not None]
    alt = f"Validation accuracy best at epoch {result['best_epoch']} with {percent(result['val_score'])}."
    if losses:
        alt += f" Training loss from {losses[0]:.3g} to {losses[-1]:.3g}."
    return drawn(lambda width: _draw(result, rows, width), caption, alt)


def _draw(result: Mapping[str, Any], rows: Rows, width: int) -> "Drawing":
    narrow = width <= NARROW
    drawing = blank(width, 480 if narrow else 300)
    loss, accuracy = drawing.subplots(2, 1) if narrow else drawing.subplots(1, 2)
    _line(
        loss,
        [(row["epoch"], row["train_loss"]) for row in rows if row.get("train_loss") is not None],
        0,
    )
    loss.set_title("Training loss")
    points = [(row["epoch"], 100 * row["val_score"]) for row in rows]
    _line(accuracy, points, 1)
    accuracy.set_title("Validation accuracy, %")
    mark_chosen(accuracy, {x: y / 100 for x, y in points}, result["best_epoch"], SERIES[1])
    return drawing


def _line(axes: "Axes", points: Sequence[tuple[float, float]], number: int) -> None:
    from matplotlib.ticker import MaxNLocator

    look = series(number, markers=len(points) < 3)
    axes.plot([x for x, _ in points], [y for _, y in points], **look)
    axes.set_xlabel("epoch")
    axes.grid(axis="y")
    axes.margins(x=0.04, y=0.1)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.locator_params(axis="y", nbins=6)
