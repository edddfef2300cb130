"""A page as one HTML file: no script, no external resource, light and dark, from a phone to paper."""

import re
from html import escape
from importlib.resources import files
from itertools import count

from deltafl.report.page import Code, Facts, Figure, Item, Listing, Page, Section, Table
from deltafl.report.svg import NARROW, WIDE, prefix_ids
from deltafl.report.tables import best_cells, show
from deltafl.report.theme import css_variables


def render(page: Page) -> str:
    """The HTML document of `page`. Every text is escaped; equal pages give equal bytes."""
    numbers = count(1)
    sections = "\n".join(_section(section, numbers) for section in page.sections)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>{escape(page.title)}</title>
<style>
:root{{{css_variables("light")}}}
@media screen and (prefers-color-scheme:dark){{:root{{{css_variables("dark")}}}}}
{files("deltafl.report").joinpath("page.css").read_text(encoding="utf-8").strip()}
</style>
</head>
<body>
<main>
<header>
<h1>{escape(page.title)}</h1>
<p class="lead">{_inline(page.lead)}</p>
</header>
{sections}
</main>
</body>
</html>
"""


def _section(section: Section, numbers: "count[int]") -> str:
    paragraphs = [
        f"<p>{_inline(text)}</p>" for text in re.split(r"\n\s*\n", section.text.strip()) if text
    ]
    items = [_item(item, next(numbers)) for item in section.items]
    return "\n".join(
        ["<section>", f"<h2>{escape(section.heading)}</h2>", *paragraphs, *items, "</section>"]
    )


def _item(item: Item, number: int) -> str:
    match item:
        case Table():
            return _table(item, number)
        case Figure():
            return _figure(item, number)
        case Facts():
            pairs = [
                f"<div><dt>{escape(what)}</dt><dd>{escape(value)}</dd></div>"
                for what, value in item.pairs
            ]
            return "\n".join(['<dl class="facts">', *pairs, "</dl>"])
        case Listing():
            return (
                "<ul>\n" + "\n".join(f"<li>{_inline(text)}</li>" for text in item.items) + "\n</ul>"
            )
        case Code():
            return f'<pre tabindex="0"><code>{escape(item.text)}</code></pre>'


def _table(table: Table, number: int) -> str:
    best = best_cells(table)
    head = "".join(
        f'<th scope="col"{_kind(column.kind)}>{escape(column.name)}</th>'
        for column in table.columns
    )
    body = []
    for r, row in enumerate(table.rows):
        cells = []
        for c, (column, value) in enumerate(zip(table.columns, row, strict=True)):
            text = escape(show(column, value))
            text = f"<strong>{text}</strong>" if (r, c) in best else text
            tag = 'th scope="row"' if c == 0 else "td"
            cells.append(f"<{tag}{_kind(column.kind)}>{text}</{tag.split()[0]}>")
        kind = ' class="reference"' if r in table.reference else ""
        body.append(f"<tr{kind}>{''.join(cells)}</tr>")
    rows = "\n".join(body)
    return f"""<div class="scroll" role="region" aria-labelledby="table-{number}" tabindex="0">
<table>
<caption id="table-{number}"><span>{_inline(table.caption)}</span></caption>
<thead><tr>{head}</tr></thead>
<tbody>
{rows}
</tbody>
</table>
</div>"""


def _figure(figure: Figure, number: int) -> str:
    drawings = [
        _drawing(figure.svg, "wide" if figure.narrow else "only", WIDE, figure.alt, f"f{number}w-")
    ]
    if figure.narrow:
        drawings.append(_drawing(figure.narrow, "narrow", NARROW, figure.alt, f"f{number}n-"))
    caption = f"\n<figcaption>{_inline(figure.caption)}</figcaption>" if figure.caption else ""
    return "<figure>\n" + "\n".join(drawings) + caption + "\n</figure>"


def _drawing(svg: str, name: str, width: int, alt: str, prefix: str) -> str:
    attributes = (
        f'<svg class="{name}" style="max-width:{width}px" role="img" aria-label="{escape(alt)}" '
    )
    return prefix_ids(svg, prefix).replace("<svg ", attributes, 1)


def _kind(kind: str) -> str:
    return "" if kind == "text" else ' class="number"'


def _inline(text: str) -> str:
    """Escaped text, what stands between backticks as code."""
    parts = text.split("`")
    if len(parts) % 2 == 0:
        return escape(text)
    return "".join(
        f"<code>{escape(part)}</code>" if i % 2 else escape(part) for i, part in enumerate(parts)
    )
