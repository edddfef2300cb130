"""What a command found, on the terminal and in a folder."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click

from deltafl.files import atomic_folder, write_files
from deltafl.report import Page, Table, page_files, search_page
from deltafl.training.record import RunRecord, write_json


def as_text(table: Table) -> str:
    """A table of the report as plain text, numbers to the right."""
    cells, numbers = table.cells(), [bool(column.show) for column in table.shown]
    rows = [list(cells), [""] * len(numbers), *cells.to_numpy().tolist()]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows[1] = ["-" * width for width in widths]
    sides = [
        f">{width}" if number else f"<{width}"
        for width, number in zip(widths, numbers, strict=True)
    ]
    return "\n".join("  ".join(map(format, row, sides)).rstrip() for row in rows)


def as_score(score: float, ratio_scaled: bool) -> str:
    """0.8321 -> "83.21%" where scores may be divided, as accuracies may; else "0.8321"."""
    return f"{score:.2%}" if ratio_scaled else f"{score:.4f}"


def write_result(
    out: str | None,
    overwrite: bool,
    page: Page,
    name: str,
    result: Mapping[str, Any],
    also: Callable[[Path], object] | None = None,
) -> None:
    """OUT, if there is to be one, whole or not at all: a page, its tables and figures, the result
    as JSON, and what `also` writes into the folder.
    """
    if out is None:
        return
    with atomic_folder(out, overwrite=overwrite) as folder:
        if also:
            also(folder)
        write_files(folder, page_files(page))
        write_json(folder / name, result)
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
