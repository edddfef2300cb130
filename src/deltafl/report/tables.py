"""One table, four ways to write it: shown cells (for HTML), Markdown, CSV and LaTeX."""

import csv
import io
import math
from collections.abc import Callable, Sequence

from deltafl.report.page import Cell, Column, Table

EMPTY = "–"


def show(column: Column, value: Cell) -> str:
    """The text of one cell: a number in the column's format, an en dash for nothing."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return EMPTY
    if isinstance(value, str) or column.kind == "text":
        return str(value)
    if column.kind == "percent":
        return f"{100 * value:.{column.digits}f}"
    return f"{value:.{column.digits}f}" if column.kind == "number" else f"{value:.{column.digits}g}"


def best_cells(table: Table) -> set[tuple[int, int]]:
    """(row, column) of every cell that shows its column's best value; equal as shown is equally good."""
    best: set[tuple[int, int]] = set()
    for c, column in enumerate(table.columns):
        values = {
            r: value
            for r, row in enumerate(table.rows)
            if isinstance(value := row[c], int | float)
            and not math.isnan(value)
            and r not in table.reference
        }
        if column.best is None or len(values) < 2:
            continue
        top = show(column, (max if column.best == "max" else min)(values.values()))
        best |= {(r, c) for r, value in values.items() if show(column, value) == top}
    return best


def to_markdown(table: Table) -> str:
    """A GitHub table with the caption above it, numbers to the right, the best in bold."""
    lines = [f"{table.caption}\n"] if table.caption else []
    lines.append(_markdown_row([column.name for column in table.columns]))
    lines.append(
        "|"
        + "|".join(" :-- " if column.kind == "text" else " --: " for column in table.columns)
        + "|"
    )
    lines += [_markdown_row(row) for row in _shown(table, _escape_markdown, "**{}**")]
    return "\n".join(lines) + "\n"


def to_csv(table: Table) -> str:
    """RFC 4180 with a header; numbers are written in full (shares, not percent), nothing is an empty field."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(column.name for column in table.columns)
    writer.writerows(["" if value is None else value for value in row] for row in table.rows)
    return out.getvalue()


def to_latex(table: Table) -> str:
    """A `table` environment for the booktabs package, the best in bold, a rule under the reference rows."""
    rows = [" & ".join(row) + r" \\" for row in _shown(table, _escape_latex, r"\textbf{{{}}}")]
    if 0 < len(table.reference) < len(rows) and set(table.reference) == set(
        range(len(table.reference))
    ):
        rows.insert(len(table.reference), r"\midrule")
    header = " & ".join(_escape_latex(column.name) for column in table.columns) + r" \\"
    shape = "".join("l" if column.kind == "text" else "r" for column in table.columns)
    return "\n".join(
        [
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{_escape_latex(table.caption)}}}",
            rf"\begin{{tabular}}{{{shape}}}",
            r"\toprule",
            header,
            r"\midrule",
            *rows,
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
            "",
        ]
    )


def _shown(table: Table, escape: Callable[[str], str], bold: str) -> list[list[str]]:
    best = best_cells(table)
    return [
        [
            bold.format(text) if (r, c) in best else text
            for c, (column, value) in enumerate(zip(table.columns, row, strict=True))
            if (text := escape(show(column, value))) is not None
        ]
        for r, row in enumerate(table.rows)
    ]


def _markdown_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _escape_markdown(text: str) -> str:
    for special in "\\`*_[]<>|":
        text = text.replace(special, "\\" + special)
    return text.replace("\n", " ")


_LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "–": "--",
    "λ": r"$\lambda$",
    "ρ": r"$\rho$",
    "η": r"$\eta$",
    **{special: "\\" + special for special in "&%$#_{}"},
}


def _escape_latex(text: str) -> str:
    return "".join(_LATEX.get(letter, letter) for letter in text)
