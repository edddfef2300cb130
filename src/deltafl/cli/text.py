"""Plain text for the terminal."""

from collections.abc import Sequence

import jinja2

from deltafl.errors import shorten
from deltafl.sizes import as_bytes


def grid(titles: Sequence[str], rows: Sequence[Sequence[str]], sides: str = "<") -> str:
    """Cells as plain text; sides: "<" for each of the first columns that is text, then numbers go
    to the right.
    """
    widths = [max(map(len, column)) for column in zip(titles, *rows, strict=True)]
    rules = ["-" * width for width in widths]
    shown = [f"{side}{w}" for side, w in zip(sides.ljust(len(widths), ">"), widths, strict=True)]
    lines = ("  ".join(map(format, row, shown)) for row in (titles, rules, *rows))
    return "\n".join(line.rstrip() for line in lines)


def render(name: str, **values: object) -> str:
    """A template of this room filled with values."""
    loader = jinja2.PackageLoader("deltafl.cli")
    look = jinja2.Environment(loader=loader, trim_blocks=True, lstrip_blocks=True)
    look.globals |= {"bytes": as_bytes, "grid": grid, "shorten": shorten}
    return look.get_template(f"{name}.txt").render(values).rstrip()


def as_score(ratio_scaled: bool, score: float) -> str:
    """0.8321 -> "83.21%" where scores may be divided, as accuracies may; else "0.8321"."""
    return f"{score:.2%}" if ratio_scaled else f"{score:.4f}"
