"""The page and the figure of `deltafl shards`: which client holds which classes."""

import re
from collections.abc import Sequence
from dataclasses import replace
from math import ceil
from typing import TYPE_CHECKING, Literal

from deltafl.report.marks import legend_below, shorten
from deltafl.report.page import Column, Facts, Figure, Page, Section, Table
from deltafl.report.parts import Result
from deltafl.report.svg import NARROW, WIDE, blank, drawn, to_png, to_svg
from deltafl.report.theme import INK, POSITIVE, REFERENCE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Drawing

MOST, LEVELS = 100, 5


def shards_page(result: Result) -> Page:
    """The numbers, who holds what, and every client's size."""
    sizes, classes = result["sizes"], result["classes"]
    missing = [
        name for name, count in zip(result["class_names"], result["left_out"], strict=True) if count
    ]
    facts = Facts(
        [
            ("clients", str(result["num_clients"])),
            ("samples at the clients", str(sum(sizes))),
            ("samples per client", span(sizes)),
            ("classes per client", span(classes)),
            ("samples at no client", str(sum(result["left_out"]))),
        ]
    )
    text = f"Left out with all their samples: {', '.join(missing)}." if missing else ""
    rows = [
        [str(client), size, held]
        for client, (size, held) in enumerate(zip(sizes, classes, strict=True))
    ]
    columns = [Column("client"), Column("samples", "number", 0), Column("classes", "number", 0)]
    lead = f"The training samples of {result['task']}, sharded by `{result['how']}` with seed {result['seed']}."
    sections = [
        Section("In numbers", text, [facts]),
        Section("Who holds what", "", [_figure(result)]),
        Section("Every client", "", [Table(columns, rows, "Samples and classes of every client.")]),
    ]
    return Page("Which client holds which classes?", lead, sections)


def shards_figure(result: Result, kind: Literal["svg", "png"] = "png") -> bytes:
    """Clients x classes as a heat map, beside it the clients' sizes."""

    def draw(width: int) -> "Drawing":
        return _draw(result, width)

    return to_png(draw, WIDE) if kind == "png" else to_svg(draw, WIDE).encode()


def span(values: Sequence[int]) -> str:
    """450 where all values are that, else "280 to 752"."""
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low} to {high}"


def _figure(result: Result) -> Figure:
    caption = "Samples of every class at every client; the darker, the more. A blank cell: none."
    if result["num_clients"] > MOST:
        caption += f" The first {MOST} of {result['num_clients']} clients are shown."
    alt = (
        f"{result['num_clients']} clients by {len(result['class_names'])} classes. "
        f"Samples per client: {span(result['sizes'])}. Classes per client: {span(result['classes'])}."
    )
    figure = drawn(lambda width: _draw(result, width), caption, alt)
    return replace(figure, svg=_compact(figure.svg), narrow=_compact(figure.narrow))


def _compact(svg: str) -> str:
    """`svg` with each box of a path written as M x y H V H z: a third of the bytes, which 100 x 100 cells need."""
    number = r"(-?[\d.]+)"
    box = rf"M {number} {number} \nL {number} \2 \nL \3 {number} \nL \1 \4 \nL \1 \2 \n"

    def shorter(found: re.Match[str]) -> str:
        left, top, right, bottom = (f"{float(value):.2f}" for value in found.groups())
        return f"M{left} {top}H{right}V{bottom}H{left}z"

    return re.sub(box, shorter, svg)


def _draw(result: Result, width: int) -> "Drawing":
    counts, sizes = result["counts"][:MOST], result["sizes"][:MOST]
    drawing = blank(width, 120 + min(max(26 * len(counts), 120), 620))
    if width <= NARROW:
        cells = drawing.add_subplot()
    else:
        cells, bars = drawing.subplots(1, 2, sharey=True, width_ratios=(5, 1))
        bars.barh(range(len(sizes)), sizes, 0.8, color=REFERENCE[1])
        bars.set_title("Samples")
        bars.tick_params(axis="y", length=0, labelleft=False)
        bars.locator_params(axis="x", nbins=3)
    _draw_cells(cells, counts, result["class_names"], width)
    legend_below(drawing, cells, columns=LEVELS)
    return drawing


def _draw_cells(
    axes: "Axes", counts: Sequence[Sequence[int]], names: Sequence[str], width: int
) -> None:
    """Five shades up to the largest count, each one path: a chart of 100 x 100 cells stays small."""
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    top = max(max(row) for row in counts)
    levels = min(LEVELS, top)
    gap = 0.04 if len(names) <= 40 and len(counts) <= 40 else 0.0
    for level in range(levels):
        low, high = top * level // levels + 1, top * (level + 1) // levels
        runs = [
            _box(i, start, stop, gap)
            for i, row in enumerate(counts)
            for start, stop in _runs(row, low, high, gap)
        ]
        if runs:
            label = str(high) if low == high else f"{low} to {high}"
            path = Path.make_compound_path(*map(Path, runs))
            axes.add_patch(
                PathPatch(
                    path, facecolor=POSITIVE, alpha=(level + 1) / levels, linewidth=0, label=label
                )
            )
    axes.set_xlim(-0.5, len(names) - 0.5)
    axes.set_ylim(len(counts) - 0.5, -0.5)
    axes.set_title("Samples of each class at each client")
    axes.set_ylabel("client")
    most = 14 if width > NARROW else 7
    readable = width > NARROW and len(names) <= 20
    if readable and len(names) * max(min(len(name), most) for name in names) < 80:
        axes.set_xticks(range(len(names)), [shorten(name, most) for name in names])
    elif readable:
        axes.set_xticks(
            range(len(names)), [shorten(name, most) for name in names], rotation=40, ha="right"
        )
    else:
        axes.set_xticks(_ticks(len(names)))
        axes.set_xlabel("class, by its number")
    axes.set_yticks(_ticks(len(counts)))
    axes.tick_params(length=0, labelcolor=INK)
    axes.spines[:].set_visible(False)


def _runs(row: Sequence[int], low: int, high: int, gap: float) -> list[tuple[int, int]]:
    """Cells of a row with `low` <= count <= `high` as (start, stop); neighbours are joined where no gap parts them."""
    runs: list[tuple[int, int]] = []
    for column, count in enumerate(row):
        if not low <= count <= high:
            continue
        if runs and runs[-1][1] == column and not gap:
            runs[-1] = (runs[-1][0], column + 1)
        else:
            runs.append((column, column + 1))
    return runs


def _box(row: int, start: int, stop: int, gap: float) -> list[tuple[float, float]]:
    left, right, top, bottom = start - 0.5 + gap, stop - 0.5 - gap, row - 0.5 + gap, row + 0.5 - gap
    return [(left, top), (right, top), (right, bottom), (left, bottom), (left, top)]


def _ticks(count: int) -> range:
    return range(0, count, ceil(count / 20) if count <= 20 else 5 * ceil(count / 60))
