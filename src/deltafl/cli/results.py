"""What a command found, on the terminal and in a folder."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import click

from deltafl.cli.text import as_score, grid, render
from deltafl.files import atomic_folder, write_files
from deltafl.report import Page, Table, page_files, search_page
from deltafl.training.record import RunRecord, write_json


def table_text(table: Table, most: int = 10_000) -> str:
    """A table of the report as plain text; of more rows than `most` the first and last five."""
    cells, columns = table.cells(), table.shown
    rows = cells.to_numpy().tolist()
    if len(rows) > most:
        rows[5:-5] = [["...", *[""] * (len(columns) - 1)]]
    return grid(list(cells), rows, "".join("<>"[bool(column.show)] for column in columns))


def page_text(page: Page) -> str:
    """What a page says, for the terminal."""
    score = partial(as_score, page.values["result"].get("ratio_scaled", True))
    return render(page.template, **page.values, table=table_text, score=score)


def show_result(
    page: Page,
    out: str | None,
    overwrite: bool,
    name: str,
    also: Callable[[Path], object] | None = None,
) -> None:
    """Say what a page says, and write OUT, if there is to be one, whole or not at all: the page,
    its tables and figures, the result as JSON, and what `also` writes into the folder.
    """
    click.echo(page_text(page))
    if out is None:
        return
    with atomic_folder(out, overwrite=overwrite) as folder:
        if also:
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
