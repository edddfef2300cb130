"""What the charts share: how a series looks, where labels go, and names cut to fit."""

import math
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from deltafl.report.theme import DASHES, INK, MARKERS, PAPER, SERIES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Drawing


def series(number: int, *, markers: bool = True) -> dict[str, Any]:
    """The look of the line `number`: a hue, after six of them another dash, and a marker of its own."""
    return {
        "color": SERIES[number % len(SERIES)],
        "linestyle": DASHES[number // len(SERIES) % len(DASHES)],
        "linewidth": 2,
        "marker": MARKERS[number % len(MARKERS)] if markers else "",
        "markersize": 4.5,
        "markeredgewidth": 0,
        "solid_capstyle": "round",
        "zorder": 3,
    }


def mark_chosen(
    axes: "Axes", points: Mapping[float, float], chosen: float | None, colour: str
) -> None:
    """Ring the point of a line that was chosen; nothing where the line has no such point."""
    at = min(points, key=lambda x: abs(x - chosen)) if chosen is not None and points else None
    if at is None or chosen is None or abs(at - chosen) > 1e-9:
        return
    spot, score = [at], [100 * points[at]]
    axes.plot(spot, score, "o", zorder=5, ms=12, mfc=PAPER, mec=colour, mew=2.4)
    axes.plot(spot, score, "o", zorder=6, ms=5, mfc=colour, mew=0)


def direct_labels(axes: "Axes", height: float) -> None:
    """Name each line at its right end, moved apart where lines end close together; `height` is the axes' in pixels."""
    import numpy as np

    low, high = axes.get_ylim()
    axes.set_ylim(low, high)
    left, right = axes.get_xlim()
    axes.set_xlim(left, right)
    lines = [line for line in axes.get_lines() if not str(line.get_label()).startswith("_")]
    ends = [np.asarray(line.get_xydata(), dtype=float)[-1] for line in lines]
    if axes.get_xscale() == "log":
        ends, left, right = [(np.log(x), y) for x, y in ends], np.log(left), np.log(right)
    starts = [((x - left) / (right - left), (y - low) / (high - low)) for x, y in ends]
    rows = spread([y for _, y in starts], 17 / height)
    for line, (x, y), row in zip(lines, starts, rows, strict=True):
        leader = axes.plot(
            [x, 1.025, 1.035], [y, row, row], transform=axes.transAxes, scalex=False, scaley=False
        )
        leader[0].set(clip_on=False, color=line.get_color(), linewidth=0.8, zorder=2)
        axes.text(
            1.045, row, str(line.get_label()), transform=axes.transAxes, va="center", color=INK
        )


def spread(wanted: Sequence[float], gap: float, low: float = 0.0, high: float = 1.0) -> list[float]:
    """Positions in the order of `wanted`, at least `gap` apart, near the wanted ones, from `low` up to `high` at best.

    Where they do not all fit between `low` and `high` they keep their gap and run over the lower end.
    """
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    placed: list[float] = []
    for i in order:
        placed.append(max(wanted[i], placed[-1] + gap) if placed else max(wanted[i], low))
    for k in range(len(placed) - 1, -1, -1):
        limit = high if k == len(placed) - 1 else placed[k + 1] - gap
        placed[k] = min(placed[k], limit)
    result = [0.0] * len(order)
    for i, position in zip(order, placed, strict=True):
        result[i] = position
    return result


def legend_below(drawing: "Drawing", axes: "Axes", columns: int = 2) -> None:
    """A legend under the chart, in rows; none for a single series."""
    handles, labels = axes.get_legend_handles_labels()
    if len(handles) > 1:
        widest = max(len(label) for label in labels)
        columns = max(
            1, min(columns, len(labels), int(drawing.get_figwidth() * 72 / (8 * widest + 40)))
        )
        drawing.legend(
            handles,
            labels,
            loc="outside lower left",
            ncols=columns,
            fontsize=11.5,
            columnspacing=1.4,
            borderpad=0.2,
        )


def decimals(value: float, *, brief: bool = False) -> str:
    """Two decimals, a true minus sign, no minus zero; `brief` leaves out a leading zero, "–" is not a number."""
    if not math.isfinite(value):
        return "–"
    text = f"{round(value, 2) + 0.0:.2f}".replace("-", "−")
    return text.replace("0.", ".", 1) if brief and abs(value) < 0.995 else text


def without_common_start(names: Sequence[str]) -> list[str]:
    """The names with their common beginning, up to its last separator, cut to "…"; short beginnings stay."""
    common = os.path.commonprefix(list(names)) if len(names) > 1 else ""  # noqa: RUF071 letters, not path parts
    cut = max(common.rfind(mark) for mark in "-_/. ") + 1
    return (
        [f"…{name[cut:]}" for name in names]
        if cut >= 6 and all(len(name) > cut for name in names)
        else list(names)
    )


def shorten(name: str, most: int) -> str:
    """`name` in at most `most` letters, the middle left out: the ends of model names tell them apart."""
    if len(name) <= most:
        return name
    head = (most - 1) // 2
    return f"{name[:head]}…{name[len(name) - (most - 1 - head) :]}"
