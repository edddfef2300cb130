"""A page: a template filled with a record and what was made of it; one HTML file, and others."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import count
from typing import Any

from markupsafe import Markup

from deltafl.rendering import render
from deltafl.report.figures import TONES, Figure, to_png, to_svg
from deltafl.report.tables import Table, score_format, to_csv, to_latex, to_markdown


@dataclass(frozen=True)
class Page:
    """A template, and the values in it: tables, figures, and the record `result` itself."""

    template: str
    values: Mapping[str, Any]

    @property
    def tables(self) -> list[Table]:
        """The tables that are written beside the page."""
        return [item for item in _items(self.values) if isinstance(item, Table)]


def page_files(page: Page) -> dict[str, bytes]:
    """File name -> content: report.html, and each table and figure that has a file.

    A table is FILE.md, FILE.csv and FILE.tex, the figures of one file are one image FILE.png.
    """
    files = {"report.html": to_html(page).encode()}
    figures: dict[str, list[Figure]] = {}
    for item in _items(page.values):
        if isinstance(item, Figure):
            figures.setdefault(f"{item.file}.png", []).append(item)
        else:
            for suffix, write in (("md", to_markdown), ("csv", to_csv), ("tex", to_latex)):
                files[f"{item.file}.{suffix}"] = write(item).encode()
    return files | {name: to_png(group) for name, group in figures.items()}


def to_html(page: Page) -> str:
    """No script, nothing external, light and dark, phone to paper; equal pages, equal bytes."""
    numbers, strong = count(1), Markup("<strong>{}</strong>").format

    def svg(figure: Figure) -> Markup:
        return Markup(to_svg(figure, f"{next(numbers)}"))

    return fill(page, "html", tones=TONES, strong=strong, svg=svg)


def fill(page: Page, kind: str, **more: object) -> str:
    """A page's template of a kind, html or txt, with its values and `more`."""
    metric = page.values["result"].get("metric", "")
    score = f"{{:{score_format(metric)}}}".format
    return render(f"{page.template}.{kind}", metric=metric, score=score, **page.values, **more)


def _items(value: object) -> Iterator[Table | Figure]:
    """What is written beside the page, anywhere in its values."""
    if isinstance(value, Table | Figure):
        yield from [value] if value.file else []
    elif isinstance(value, Mapping | list):
        for one in value.values() if isinstance(value, Mapping) else value:
            yield from _items(one)
