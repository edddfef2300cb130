"""What a command found, on the terminal and in a folder."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click

from deltafl.files import atomic_folder, write_files
from deltafl.report import Page, Table, page_files, search_page
from deltafl.report.page import fill
from deltafl.training.record import RunRecord, write_json


def table_text(table: Table) -> str:
    """A table of the report as plain text."""
    cells = table.cells()
    titles, rows = list(cells), cells.to_numpy().tolist()
    widths = [max(map(len, column)) for column in zip(titles, *rows, strict=True)]
    sides = ["<>"[bool(column.show)] for column in table.shown]
    looks = [f"{side}{width}" for side, width in zip(sides, widths, strict=True)]
    lines = [titles, ["-" * width for width in widths], *rows]
    return "\n".join("  ".join(map(format, line, looks)).rstrip() for line in lines)


def page_text(page: Page, **more: object) -> str:
    """What a page says, for the terminal, and `more`."""
    return fill(page, "txt", table=table_text, **more)


def show_result(
    page: Page,
    out: str | None,
    overwrite: bool,
    name: str,
    also: Callable[[Path], object] = lambda folder: None,
) -> None:
    """Say what a page says, and write OUT, if there is to be one, whole or not at all: the page,
    its tables and figures, the result as JSON, and what `also` writes into the folder.
    """
    click.echo(page_text(page))
    if out is None:
        return
    with atomic_folder(out, overwrite=overwrite) as folder:
        also(folder)
        write_files(folder, page_files(page))
        write_json(folder / name, page.values["result"])
    click.echo(f"report: {Path(out) / 'report.html'}")


def write_search(
    result: Mapping[str, Any], folder: Path, config: dict[str, Any], *, story: bool = False
) -> None:
    """config.yaml, record.jsonl (one row for each candidate), result.json, table.md/.csv/.tex and
    report.html.
    """
    record = RunRecord.create(folder, config)
    for event, rows in (("candidate", result["candidates"]), ("test", result["rows"])):
        for row in rows:
            record.append({"event": event, **row})
    write_json(folder / "result.json", result)
    write_files(folder, page_files(search_page(result, story=story)))
