"""Line charts: score against the scaling coefficient, accuracy against rounds."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from deltafl.report.marks import direct_labels, legend_below, mark_chosen, series, shorten
from deltafl.report.page import Figure
from deltafl.report.svg import NARROW, blank, drawn
from deltafl.report.theme import MUTED, SERIES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Drawing

Curve = Sequence[Sequence[float]]


def lambda_curves(
    curves: Mapping[str, Curve],
    chosen: Mapping[str, float],
    baseline: float | None = None,
    *,
    baseline_name: str = "base (unmerged)",
    score_name: str = "Normalised accuracy on validation",
    caption: str = "",
) -> Figure:
    """Score against the scaling coefficient, one line per rule, the chosen coefficient of each ringed.

    Rules whose curves are equal share one line and one label. Scores are shares and shown in percent.
    """
    groups: dict[tuple[tuple[float, float], ...], list[str]] = {}
    for name, curve in curves.items():
        groups.setdefault(tuple(sorted((float(x), float(y)) for x, y in curve)), []).append(name)
    lines = {" = ".join(names): points for points, names in groups.items() if points}
    rings = {" = ".join(names): chosen[names[0]] for names in groups.values() if names[0] in chosen}

    def draw(width: int) -> "Drawing":
        title = f"{score_name}, %"
        drawing, axes = _line_chart(
            lines, width, title, "scaling coefficient λ", floor=(baseline_name, baseline)
        )
        for number, (label, points) in enumerate(lines.items()):
            mark_chosen(axes, dict(points), rings.get(label), SERIES[number % len(SERIES)])
        return drawing

    tops = ", ".join(f"{label} {rings[label]:g}" for label in lines if label in rings)
    alt = f"{score_name} against the scaling coefficient for {len(lines)} curves. Chosen: {tops or 'none'}."
    return drawn(draw, caption, alt)


def rounds_curve(
    runs: Mapping[str, Curve],
    x_label: str = "round",
    *,
    score_name: str = "Accuracy",
    caption: str = "",
    log_x: bool = False,
) -> Figure:
    """Accuracy against rounds (or steps, or bytes), one line per run; `log_x` as in `draw_lines`."""

    def draw(width: int) -> "Drawing":
        return draw_lines(runs, width, f"{score_name}, %", x_label, markers=False, log_x=log_x)

    ends = ", ".join(
        f"{name} {100 * points[-1][1]:.1f}%" for name, points in runs.items() if points
    )
    return drawn(draw, caption, f"{score_name} against {x_label}. At the end: {ends}.")


def draw_lines(
    lines: Mapping[str, Curve],
    width: int,
    title: str,
    x_label: str,
    *,
    markers: bool = True,
    log_x: bool = False,
) -> "Drawing":
    """A drawing of lines alone, for a file. `log_x`: a logarithmic axis, on which points at 0 have no place."""
    if not log_x:
        return _line_chart(lines, width, title, x_label, markers=markers)[0]
    placed = {name: [point for point in points if point[0] > 0] for name, points in lines.items()}
    held = {name: points for name, points in placed.items() if points}
    return _line_chart(held, width, title, f"{x_label} (logarithmic)", markers=markers, log_x=True)[
        0
    ]


def _log_axis(axes: "Axes") -> None:
    """A logarithmic x axis with plain numbers at 1, 2 and 5."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))


def _line_chart(
    lines: Mapping[str, Curve],
    width: int,
    title: str,
    x_label: str,
    *,
    markers: bool = True,
    floor: tuple[str, float | None] = ("", None),
    log_x: bool = False,
) -> tuple["Drawing", "Axes"]:
    """Lines with their names beside them, or below on a phone; `floor` is a level to compare with, and its name."""
    narrow = width <= NARROW
    height = 300 if narrow else 390
    drawing = blank(width, height + (19 * (len(lines) + 1) if narrow else 0))
    axes = drawing.add_subplot()
    for number, (name, points) in enumerate(lines.items()):
        ordered = sorted(points, key=lambda point: point[0])
        look = series(number, markers=markers)
        label = shorten(name, 40 if narrow else 34)
        axes.plot([x for x, _ in ordered], [100 * y for _, y in ordered], label=label, **look)
    name, level = floor
    places = [x for points in lines.values() for x, _ in points]
    if level is not None and places:
        ends = [min(places), max(places)]
        axes.plot(
            ends,
            [100 * level] * 2,
            color=MUTED,
            linewidth=1.4,
            linestyle=(0, (2, 2)),
            zorder=2,
            label=name,
        )
    axes.set_title(title)
    axes.set_xlabel(x_label)
    axes.grid(axis="y")
    axes.margins(x=0.02, y=0.08)
    axes.locator_params(axis="y", nbins=6)
    if log_x:
        _log_axis(axes)
    else:
        axes.locator_params(
            axis="x", nbins=6 if narrow else 10, integer=all(float(x).is_integer() for x in places)
        )
    if narrow:
        legend_below(drawing, axes)
    else:
        direct_labels(axes, height - 80)
    return drawing, axes
