"""Bars: accuracy per task and rule."""

from collections.abc import Mapping, Sequence
from math import isnan, nan
from typing import TYPE_CHECKING

from deltafl.report.marks import legend_below, shorten
from deltafl.report.page import Figure
from deltafl.report.svg import NARROW, blank, drawn
from deltafl.report.theme import INK, MUTED, REFERENCE, SERIES

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Drawing


def task_bars(
    scores: Mapping[str, Mapping[str, float]], *, reference: Sequence[str] = (), caption: str = ""
) -> Figure:
    """Accuracy per task, one bar per rule, grouped by task; the rules in `reference` are grey.

    Few bars stand upright on a wide page; many bars, or a narrow page, lie flat so that every name is readable.
    """
    alt = "Accuracy per task. " + "; ".join(
        f"{task}: "
        + ", ".join(f"{rule} {100 * row[task]:.1f}%" for rule, row in scores.items() if task in row)
        for task in _tasks(scores)
    )
    return drawn(lambda width: draw_task_bars(scores, width, reference), caption, f"{alt}.")


def draw_task_bars(
    scores: Mapping[str, Mapping[str, float]], width: int, reference: Sequence[str] = ()
) -> "Drawing":
    """The drawing of `task_bars`."""
    colours: dict[str, str] = {}
    for rule in scores:
        grey = rule in reference
        shades = REFERENCE if grey else SERIES
        colours[rule] = shades[sum((other in reference) == grey for other in colours) % len(shades)]
    tasks = _tasks(scores)
    flat = width <= NARROW or len(tasks) * len(scores) > 72
    return (_flat_bars if flat else _upright_bars)(scores, tasks, colours, width)


def _tasks(scores: Mapping[str, Mapping[str, float]]) -> list[str]:
    return list(dict.fromkeys(task for row in scores.values() for task in row))


def _upright_bars(
    scores: Mapping[str, Mapping[str, float]],
    tasks: list[str],
    colours: Mapping[str, str],
    width: int,
) -> "Drawing":
    drawing = blank(width, 360)
    axes = drawing.add_subplot()
    bar = 0.84 / len(colours)
    for number, (rule, colour) in enumerate(colours.items()):
        at = [i - 0.42 + bar * (number + 0.5) for i in range(len(tasks))]
        heights = [100 * scores[rule].get(task, nan) for task in tasks]
        axes.bar(at, heights, bar * 0.88, color=colour, label=shorten(rule, 34))
    axes.set_xticks(range(len(tasks)), [shorten(task, 120 // len(tasks) + 4) for task in tasks])
    axes.tick_params(axis="x", length=0, labelcolor=INK)
    axes.set_ylim(0, 100)
    axes.set_xlim(-0.5, len(tasks) - 0.5)
    axes.grid(axis="y")
    axes.set_title("Accuracy on test images, %")
    legend_below(drawing, axes, columns=4)
    return drawing


def _flat_bars(
    scores: Mapping[str, Mapping[str, float]],
    tasks: list[str],
    colours: Mapping[str, str],
    width: int,
) -> "Drawing":
    thick, gap = 13, 34
    group = thick * len(colours) + gap
    drawing = blank(width, group * len(tasks) + 34 + 22 * ((len(colours) + 1) // 2))
    axes = drawing.add_subplot()
    for number, (rule, colour) in enumerate(colours.items()):
        at = [group * i + gap + thick * (number + 0.5) for i in range(len(tasks))]
        widths = [100 * scores[rule].get(task, nan) for task in tasks]
        axes.barh(at, widths, thick * 0.84, color=colour, label=shorten(rule, 40))
        for y, value in zip(at, widths, strict=True):
            if not isnan(value):
                axes.text(
                    value + 1.2, y, f"{value:.1f}", va="center_baseline", fontsize=10, color=MUTED
                )
    for i, task in enumerate(tasks):
        axes.text(
            0, group * i + gap - 7, shorten(task, width // 9), va="baseline", color=INK, fontsize=13
        )
    axes.set_ylim(group * len(tasks), 6)
    axes.set_xlim(0, 112)
    axes.set_xticks([0, 25, 50, 75, 100])
    axes.set_yticks([])
    axes.spines["bottom"].set_visible(False)
    axes.tick_params(axis="x", length=0)
    axes.grid(axis="x")
    axes.set_title("Accuracy on test images, %")
    legend_below(drawing, axes)
    return drawing
