"""Charts, each drawn once for phone and desktop: SVG for the page, PNG for a file."""

import os
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from math import ceil
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure as Drawing
from matplotlib.ticker import LogLocator

from deltafl.report.tables import read_data

WIDTH = 420
"""Pixels of every drawing: shown smaller by a quarter on a phone, larger where there is room."""

LETTER = 7.4
"""Pixels of a letter at the charts' size of type, 12.5: what is cut or turned goes by it."""

ROWS = 60
"""Most rows of a heat map that each have a label."""

APART = 4
"""Series whose ends differ by this factor are drawn over a logarithmic axis."""

STYLE = Path(__file__).with_name("charts.mplstyle")
TONES = read_data("theme")
"""Role -> {"light": colour, "dark": colour}."""

PAPER, INK, MUTED = (TONES[role]["light"] for role in ("paper", "ink", "muted"))
SERIES = [tone["light"] for role, tone in TONES.items() if role.startswith("series")]
FILLS = ("#2272b9", "#bf560b")
"""Of heat maps, above and below neutral, strong in both themes; white is legible on them."""

MARKERS = "osD^vPXp"


@dataclass(frozen=True)
class Figure:
    """A chart. `alt` says in words what it shows.

    file: where it is written beside the page, as FILE.png, with others of that name; "" is nowhere.
    """

    draw: Callable[[Axes], None]
    height: int
    caption: str
    alt: str
    file: str = ""


def chart(
    series: Mapping[str, Sequence[Sequence[float]]],
    title: str,
    x_label: str,
    *,
    show: str = "g",
    joined: bool = True,
    rings: Mapping[str, float] | None = None,
    level: tuple[str, float] | None = None,
    caption: str = "",
    file: str = "",
) -> Figure:
    """Points (x, y) of each series, joined or not, in a colour and with a marker of its own.

    Of more series than there are colours those with the highest points are drawn.

    show: how y is written. rings: series -> the x of a point to ring. level: the name and y of a
    line to compare with. The x axis is logarithmic, without points at 0, where its numbers are no
    counts and series end far apart.
    """
    tops = {name: max(y for _, y in line) for name, line in series.items() if line}
    best = sorted(tops, key=tops.__getitem__, reverse=True)[: len(SERIES)]
    names = [name for name in tops if name in best]
    if len(names) < len(tops):
        caption += f" The {len(names)} best of {len(tops)} are drawn."
    labels = [_end(name, 40) for name in names]
    columns = max(1, int(WIDTH // (LETTER * max(map(len, labels), default=1) + 40)))
    points = {name: np.array(sorted(map(tuple, series[name])), dtype=float) for name in names}
    ends = [line[-1, 0] for line in points.values() if len(line) > 1] or [0]
    whole = all((line[:, 0] % 1 == 0).all() for line in points.values())
    log = bool(not whole and 0 < APART * min(ends) <= max(ends))

    def draw(axes: Axes) -> None:
        for name, label, colour, marker in zip(names, labels, SERIES, MARKERS, strict=False):
            x, y = points[name][points[name][:, 0] > 0 if log else ...].T
            look: dict[str, Any] = {"markevery": 0.08} if joined else {"linestyle": ""}
            axes.plot(x, y, color=colour, label=label, marker=marker, **look)
            ring = x == (rings or {}).get(name)
            axes.plot(x[ring], y[ring], "o", mfc=PAPER, mec=colour, mew=2.4, ms=11, zorder=5)
        if level is not None:
            axes.axhline(level[1], label=level[0], color=MUTED, lw=1.4, ls=(0, (2, 2)))
        axes.set(title=title, xlabel=x_label + " (logarithmic)" * log)
        axes.grid(axis="y")
        axes.locator_params(nbins=6)
        axes.locator_params("x", integer=whole)
        if log:
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.minorticks_off()
            axes.xaxis.set_major_formatter("{x:g}")
        if show.endswith("%"):
            axes.yaxis.set_major_formatter(lambda y, _: f"{100 * y:.3g}%")
        if len(names) > 1:
            axes.figure.legend(loc="outside lower left", ncols=columns)

    legend = 20 * ceil((len(names) + 1) / columns) if len(names) > 1 else 0
    highest = ", ".join(f"{name} {tops[name]:{show}}" for name in names)
    return Figure(draw, 290 + legend, caption, f"{title}. Highest: {highest}.", file)


def heat_map(
    frame: pd.DataFrame,
    title: str,
    *,
    show: str = ".2f",
    neutral: float | pd.Series = 0.0,
    caption: str = "",
    file: str = "",
) -> Figure:
    """The values, written where there is room; NaN stays blank, an infinity is a dash.

    A cell's strength is its distance from `neutral`, or from that of its column, relative to the
    largest one (of the column); below neutral it has another hue.
    """
    values = frame.to_numpy(dtype=float)
    apart = frame.where(np.isfinite(values)).sub(neutral)
    largest = apart.abs().max(axis=0 if isinstance(neutral, pd.Series) else None)
    strength = (apart / largest).fillna(0).to_numpy(dtype=float)
    rows, columns = _labels(frame.index, 22), _labels(frame.columns, 16)
    width = (WIDTH - LETTER * max(map(len, rows))) / len(columns)
    height = max(22 if len(rows) <= ROWS else 6, min(0.6 * width, 44, 400 / len(rows)))
    longest = max(map(len, columns))
    turned = LETTER * longest > width

    def draw(axes: Axes) -> None:
        image = np.zeros((*values.shape, 4))
        for row, column in np.argwhere(~np.isnan(values)):
            value, share = values[row, column], strength[row, column]
            text = f"{value:{show}}".strip("%").replace("-", "−").replace("inf", "–")
            if np.isfinite(value):
                image[row, column] = to_rgba(FILLS[int(share < 0)], 0.06 + 0.94 * float(abs(share)))
            if height >= 16 and LETTER * len(text) < width:
                look = {"ha": "center", "va": "center_baseline", "in_layout": False}
                axes.text(column, row, text, color="white" if abs(share) > 0.8 else INK, **look)
        axes.imshow(image, aspect="auto", interpolation="none")
        axes.set_title(title)
        every = ceil(18 / width) if turned else 1
        turn: dict[str, Any] = (
            {"rotation": 45, "ha": "left", "rotation_mode": "anchor"} if turned else {}
        )
        axes.set_xticks(range(0, len(columns), every), columns[::every], **turn)
        every = ceil(16 / height)
        axes.set_yticks(range(0, len(rows), every), rows[::every])
        if len(rows) <= ROWS:
            axes.set_xticks(np.arange(len(columns)) + 0.5, minor=True)
            axes.set_yticks(np.arange(len(rows)) + 0.5, minor=True)
            axes.grid(which="minor", color=PAPER, linewidth=2.5)
        axes.tick_params(which="both", length=0, labelcolor=INK, labeltop=True, labelbottom=False)
        axes.spines[:].set_visible(False)

    known = np.sort(values[np.isfinite(values)])
    ends = " to ".join(f"{value:{show}}" for value in known[:: max(1, len(known) - 1)])
    alt = f"{title}. {len(rows)} by {len(columns)} values, {ends}."
    return Figure(draw, round(60 + turned * 5 * longest + height * len(rows)), caption, alt, file)


def to_svg(figure: Figure, salt: str) -> str:
    """One `<svg>` element for a page: real text, ids of their salt, the same bytes each time."""
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    text = _saved([figure], salt, format="svg", metadata=nothing, transparent=True).decode()
    return re.sub(r'<g id="[^"]*"', "<g", text[text.index("<svg") :])


def to_png(figures: Sequence[Figure]) -> bytes:
    """The figures in one image, one below the other, three pixels to the CSS pixel."""
    look: dict[str, Any] = {"dpi": 216, "bbox_inches": "tight", "pad_inches": 0.2}
    return _saved(figures, "", format="png", metadata={"Software": None}, **look)


def _saved(figures: Sequence[Figure], salt: str, **options: Any) -> bytes:
    heights, out = [figure.height for figure in figures], BytesIO()
    with matplotlib.rc_context(fname=STYLE):
        matplotlib.rcParams["svg.hashsalt"] = salt
        drawing = Drawing(figsize=(WIDTH / 72, sum(heights) / 72), dpi=72, layout="constrained")
        parts = drawing.subfigures(len(figures), squeeze=False, height_ratios=heights)
        for figure, part in zip(figures, parts[:, 0], strict=True):
            figure.draw(part.add_subplot())
        drawing.savefig(out, **options)
    return out.getvalue()


def _labels(labels: Collection[object], most: int) -> list[str]:
    """The names without a long beginning that all share, and the last `most` letters of those."""
    names = list(map(str, labels))
    common = os.path.commonprefix(names) if len(names) > 1 else ""  # noqa: RUF071
    cut = max(common.rfind(mark) for mark in "-_/ ") + 1
    short = [f"…{name[cut:]}" if cut >= 6 and name[cut:] else name for name in names]
    return [_end(name, most) for name in short]


def _end(name: str, most: int) -> str:
    return name if len(name) <= most else f"…{name[1 - most :]}"
