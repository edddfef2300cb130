"""Heat maps of a matrix over models, and norms layer by layer."""

from collections.abc import Mapping, Sequence
from math import isfinite, nan
from typing import TYPE_CHECKING

from deltafl.report.marks import decimals, legend_below, series, shorten, without_common_start
from deltafl.report.page import Figure
from deltafl.report.svg import NARROW, blank, drawn
from deltafl.report.theme import INK, MUTED, NEGATIVE, ON_FILL, POSITIVE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Drawing

Matrix = Sequence[Sequence[float | None]]
Profile = Sequence[tuple[str, float]] | Sequence[Sequence[str | float]]


def heat_map(
    names: Sequence[str],
    matrix: Matrix,
    *,
    neutral: float = 0.0,
    what: str = "Cosine",
    caption: str = "",
) -> Figure:
    """A symmetric [n, n] matrix with its values in the cells; the diagonal says nothing and stays blank.

    The strength of a cell's colour is its distance from `neutral`, relative to the largest one off the diagonal.
    None and NaN (a delta of zero has no direction) are shown as a dash.
    """
    values = _numbers(matrix)

    def draw(width: int) -> "Drawing":
        drawing = blank(width, heat_map_height(names, width))
        draw_heat_map(drawing.add_subplot(), names, matrix, width, neutral)
        return drawing

    indices = [(i, j) for i in range(len(names)) for j in range(i) if isfinite(values[i][j])]
    pairs = [(values[i][j], names[i], names[j]) for i, j in indices]
    alt = f"{what} of every pair of {len(names)} models."
    if pairs:
        (low, a, b), (high, c, d) = min(pairs), max(pairs)
        alt += f" Lowest {decimals(low)} ({a} and {b}), highest {decimals(high)} ({c} and {d})."
    return drawn(draw, caption, alt)


def heat_map_height(names: Sequence[str], width: int) -> float:
    """The height that keeps the cells of a heat map of that width comfortable to read."""
    return (
        min(width * 0.62, 46 * len(names)) + 80
        if width > NARROW
        else min(52 * len(names), 290) + 70
    )


def draw_heat_map(
    axes: "Axes", names: Sequence[str], matrix: Matrix, width: int, neutral: float = 0.0
) -> None:
    """Draw the cells on `axes`, which is about `width` pixels wide."""
    from matplotlib.patches import Rectangle

    n, narrow, values = len(names), width <= NARROW, _numbers(matrix)
    labels = [shorten(name, 15 if narrow else 26) for name in without_common_start(names)]
    longest = max(map(len, labels), default=0)
    cell = (width - 7.6 * longest) / max(n, 1)
    slanted = 7.6 * longest > cell
    known = [
        abs(values[i][j] - neutral)
        for i in range(n)
        for j in range(n)
        if i != j and isfinite(values[i][j])
    ]
    scale = max(known, default=0) or 1
    for i, j in ((i, j) for i in range(n) for j in range(n) if i != j):
        strength = (values[i][j] - neutral) / scale if isfinite(values[i][j]) else 0
        colour = POSITIVE if strength >= 0 else NEGATIVE
        axes.add_patch(
            Rectangle(
                (j - 0.48, i - 0.47),
                0.96,
                0.94,
                facecolor=colour,
                alpha=0.06 + 0.94 * abs(strength),
            )
        )
        if cell >= 22:
            ink = ON_FILL if abs(strength) > 0.6 else INK
            size = 10 if cell < 34 else 11 if cell < 44 else 12.5
            text = decimals(values[i][j], brief=cell < 36)
            axes.text(j, i, text, ha="center", va="center_baseline", color=ink, fontsize=size)
    axes.set_xlim(-0.5, n - 0.5)
    axes.set_ylim(n - 0.5, -0.5)
    if slanted and narrow:
        axes.set_xticks(range(n), [str(i + 1) for i in range(n)])
        labels = [f"{label}  {i}" for i, label in enumerate(labels, 1)]
    elif slanted:
        axes.set_xticks(range(n), labels, rotation=40, ha="left", rotation_mode="anchor")
    else:
        axes.set_xticks(range(n), labels)
    axes.set_yticks(range(n), labels)
    axes.tick_params(
        length=0, labelcolor=INK, top=False, labeltop=True, bottom=False, labelbottom=False
    )
    axes.spines[:].set_visible(False)


def layer_profile(
    layers: Mapping[str, Profile], *, what: str = "Norm of the delta", caption: str = ""
) -> Figure:
    """Norm per layer, one line per model; the layers run down the page so that their names can be read."""

    def draw(width: int) -> "Drawing":
        rows = max(map(len, layers.values()), default=0)
        drawing = blank(width, 110 + min(26 * rows, 900) + 11 * len(layers))
        axes = drawing.add_subplot()
        draw_layer_profile(axes, layers, width)
        axes.set_title(what)
        legend_below(drawing, axes, columns=2 if width <= NARROW else 4)
        return drawing

    peaks = {
        model: max((float(norm), name) for name, norm in rows)
        for model, rows in layers.items()
        if rows
    }
    largest = "; ".join(f"{model} in {name} ({norm:.3g})" for model, (norm, name) in peaks.items())
    alt = f"{what} layer by layer. Largest: {largest}"
    return drawn(draw, caption, f"{alt}.")


def draw_layer_profile(axes: "Axes", layers: Mapping[str, Profile], width: int) -> None:
    """Draw the lines on `axes`, which is about `width` pixels wide; a log scale where norms differ thirtyfold."""
    names = list(dict.fromkeys(str(name) for profile in layers.values() for name, _ in profile))
    for number, (model, profile) in enumerate(
        zip(without_common_start(list(layers)), layers.values(), strict=True)
    ):
        rows = [names.index(str(name)) for name, _ in profile]
        axes.plot(
            [float(norm) for _, norm in profile], rows, label=shorten(model, 34), **series(number)
        )
    norms = [float(norm) for profile in layers.values() for _, norm in profile if float(norm) > 0]
    if norms and max(norms) > 30 * min(norms):
        axes.set_xscale("log")
    else:
        axes.set_xlim(left=0)
    every = 1 + len(names) // 36
    most = 16 if width <= NARROW else 40
    axes.set_yticks(range(0, len(names), every), [shorten(name, most) for name in names[::every]])
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.tick_params(axis="y", labelcolor=INK)
    axes.tick_params(axis="x", labelcolor=MUTED)
    axes.grid(True)


def _numbers(matrix: Matrix) -> list[list[float]]:
    return [[nan if value is None else float(value) for value in row] for row in matrix]
