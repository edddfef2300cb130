"""From a matplotlib figure to SVG text that is the same byte for byte, small, and safe to inline in a page."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BytesIO
from typing import TYPE_CHECKING, Any

from deltafl.report.page import Figure
from deltafl.report.theme import INK, LINE, MUTED, follow_theme

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Drawing

WIDE, NARROW = 832, 328
"""Widths of the two drawings of a chart, in CSS pixels: a desktop's column, and a phone of 360 px less its margins."""

Draw = Callable[[int], "Drawing"]


@contextmanager
def chart_style() -> Iterator[None]:
    """The type, lines and SVG settings of every chart, set for the time of drawing only."""
    import matplotlib

    settings: dict[Any, Any] = {
        "font.family": "sans-serif",
        "font.sans-serif": ["DejaVu Sans"],
        "font.size": 12.5,
        "text.color": INK,
        "axes.edgecolor": LINE,
        "axes.labelcolor": MUTED,
        "axes.titlecolor": MUTED,
        "axes.titlelocation": "left",
        "axes.titlesize": 12.5,
        "axes.titlepad": 12,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.spines.left": False,
        "axes.axisbelow": True,
        "axes.unicode_minus": True,
        "grid.color": LINE,
        "grid.linewidth": 1,
        "xtick.color": LINE,
        "ytick.color": LINE,
        "xtick.labelcolor": MUTED,
        "ytick.labelcolor": MUTED,
        "xtick.major.size": 4,
        "ytick.major.size": 0,
        "legend.frameon": False,
        "legend.handlelength": 1.6,
        "svg.fonttype": "none",
        "svg.hashsalt": "deltafl",
        "text.parse_math": False,
        "path.simplify": False,
    }
    with matplotlib.rc_context(settings):
        yield


def blank(width: int, height: float) -> "Drawing":
    """An empty drawing of the given size in CSS pixels, transparent, that makes room for its labels."""
    from matplotlib.figure import Figure as Drawing

    drawing = Drawing(figsize=(width / 72, height / 72), dpi=72, layout="constrained")
    drawing.patch.set_alpha(0)
    return drawing


def drawn(draw: Draw, caption: str, alt: str) -> Figure:
    """The figure of `draw(WIDE)` and `draw(NARROW)`."""
    return Figure(to_svg(draw, WIDE), caption, alt, narrow=to_svg(draw, NARROW))


def to_svg(draw: Draw, width: int) -> str:
    """The drawing as one `<svg>` element: real text in the page's font, colours that follow the page's theme."""
    out = BytesIO()
    with chart_style():
        draw(width).savefig(
            out, format="svg", metadata={"Date": None, "Creator": None}, transparent=True
        )
    svg = out.getvalue().decode()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, count=1, flags=re.S)
    # Matplotlib's style element would select every element of the page that the chart is inlined in.
    svg = re.sub(r'<style type="text/css">.*?</style>', "", svg, count=1, flags=re.S)
    svg = re.sub(r"<!--.*?-->\s*", "", svg, flags=re.S)
    svg = _in_tags(svg, lambda tag: re.sub(r"font-family: [^;\"]*(; )?", "", tag))
    svg = _in_tags(svg, lambda tag: re.sub(r' transform="rotate\(-0 [^)]*\)"', "", tag))
    view = re.search(r'viewBox="([^"]+)"', svg)
    if view is None:
        raise ValueError("matplotlib wrote an SVG without a viewBox")
    root = (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{view[1]}" font-family="system-ui, sans-serif" stroke-linejoin="round">'
    )
    svg = re.sub(r"<svg[^>]*>", root, svg, count=1)
    return _in_tags(re.sub(r"\n\s*", "\n", svg).strip(), follow_theme)


def to_png(draw: Draw, width: int, scale: float = 2) -> bytes:
    """The drawing as a PNG image on a white ground, `scale` pixels to the CSS pixel."""
    out = BytesIO()
    with chart_style():
        draw(width).savefig(
            out, format="png", dpi=72 * scale, facecolor="white", metadata={"Software": None}
        )
    return out.getvalue()


def prefix_ids(svg: str, prefix: str) -> str:
    """`svg` with `prefix` before every id and every reference to one, so that several live in one page."""

    def rename(tag: str) -> str:
        tag = re.sub(r'(\sid|href)="(#?)', rf'\1="\2{prefix}', tag)
        return tag.replace("url(#", f"url(#{prefix}")

    return _in_tags(svg, rename)


def _in_tags(svg: str, change: Callable[[str], str]) -> str:
    """`change` applied to the tags only: what the chart's texts say is the user's."""
    return re.sub(r"<[^>]*>", lambda tag: change(tag[0]), svg)
