"""What a command found, on the terminal and in a folder."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from deltafl.cli.text import table
from deltafl.files import atomic_folder, write_files
from deltafl.report import Page, Table, page_files, search_page
from deltafl.training.record import RunRecord, write_json


def as_text(records: Table) -> str:
    """A table of the report as plain text."""
    cells = records.cells()
    return table(list(cells), cells.to_numpy().tolist())


def write_result(
    out: str, overwrite: bool, page: Page, name: str, result: Mapping[str, Any]
) -> None:
    """OUT with a page, its tables and figures, and the result as JSON; whole or not at all."""
    with atomic_folder(out, overwrite=overwrite) as folder:
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
    for row in result["candidates"]:
        record.append({"event": "candidate", **row})
    for row in result["rows"]:
        record.append({"event": "test", **row})
    write_json(folder / "result.json", result)
    write_files(folder, page_files(search_page(result, story=story)))
