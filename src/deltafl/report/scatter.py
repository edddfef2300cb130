"""Points: what one number does as another one grows."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from deltafl.report.marks import legend_below, series
from deltafl.report.svg import NARROW, blank
from deltafl.report.theme import MUTED

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Drawing


def draw_points(
    points: Mapping[str, Sequence[tuple[float, float]]], width: int, title: str, x_label: str
) -> "Drawing":
    """Shares, shown times 100, against ratios on a logarithmic axis, one colour and mark for each name."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    narrow = width <= NARROW
    drawing = blank(
        width, (300 if narrow else 390) + 19 * (len(points) + 1) // (1 if narrow else 4)
    )
    axes = drawing.add_subplot()
    axes.axhline(0, color=MUTED, linewidth=1.2, zorder=2)
    for number, (name, pairs) in enumerate(points.items()):
        look = {**series(number), "linestyle": "", "alpha": 0.75}
        axes.plot([x for x, _ in pairs], [100 * y for _, y in pairs], label=name, **look)
    if any(x > 1 for pairs in points.values() for x, _ in pairs):
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.set_title(title)
    axes.set_xlabel(x_label)
    axes.grid(axis="y")
    legend_below(drawing, axes, columns=2 if narrow else 4)
    return drawing
