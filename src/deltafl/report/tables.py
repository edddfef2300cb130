"""Records as a table, and the ways to write it: HTML (by the page), Markdown, CSV, LaTeX."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import pandas as pd

Record = Mapping[Any, Any]
NOTHING = "–"


class Column(NamedTuple):
    """How one key of the records is shown.

    show: a format specification of numbers (".1%", ",.0f") or a function of the value; "" is text.
    best: whether the largest value is marked, among the rows that are no reference.
    """

    title: str
    show: str | Callable[[Any], str] = ""
    best: bool = False


@dataclass(frozen=True)
class Table:
    """Records under the columns of their keys; a column that is empty in every record is left out.

    reference: texts; a row with one of them as a cell is there to compare with, and never the best.
    file: where the table is written beside the page, without suffix; "" is nowhere.
    """

    rows: Sequence[Record]
    columns: Mapping[Any, Column]
    caption: str = ""
    reference: Collection[str] = ()
    file: str = ""

    @property
    def shown(self) -> dict[Any, Column]:
        """The columns that are not empty."""
        known = {key for row in self.rows for key, value in row.items() if value is not None}
        return {key: column for key, column in self.columns.items() if key in known}

    @property
    def references(self) -> list[bool]:
        """For each row whether it is a reference."""
        texts = [key for key, column in self.columns.items() if not column.show]
        return [any(row.get(key) in self.reference for key in texts) for row in self.rows]

    def cells(
        self, mark: Callable[[str], str] = str, escape: Callable[[str], str] = str
    ) -> pd.DataFrame:
        """The texts of the cells, escaped; those that show their column's best value are marked."""
        cells = []
        for key, column in self.shown.items():
            texts = [_show(column, row.get(key)) for row in self.rows]
            rivals = [
                row[key]
                for row, reference in zip(self.rows, self.references, strict=True)
                if column.best and not reference and row.get(key) is not None
            ]
            best = _show(column, max(rivals)) if rivals else None
            cells.append(
                [
                    mark(escape(text)) if text == best and not reference else escape(text)
                    for text, reference in zip(texts, self.references, strict=True)
                ]
            )
        titles = [escape(column.title) for column in self.shown.values()]
        return pd.DataFrame(cells, index=titles, dtype=object).T


def to_markdown(table: Table) -> str:
    """A GitHub table with the caption above it, numbers to the right, the best in bold."""
    cells = table.cells("**{}**".format, lambda text: text.translate(_MARKDOWN))
    sides = [" --: " if column.show else " :-- " for column in table.shown.values()]
    head, *rows = [f"| {' | '.join(row)} |" for row in (cells, *cells.to_numpy())]
    lines = [*[table.caption, ""] * bool(table.caption), head, f"|{'|'.join(sides)}|", *rows, ""]
    return "\n".join(lines)


def to_csv(table: Table) -> str:
    """RFC 4180 with a header; numbers in full (shares, not percent), nothing is an empty field."""
    frame = pd.DataFrame(table.rows, columns=list(table.shown), dtype=object)
    titles = [column.title for column in table.shown.values()]
    return frame.to_csv(index=False, header=titles, lineterminator="\n")


def to_latex(table: Table) -> str:
    """A `table` environment for the booktabs package, the best in bold."""
    sides = "".join("r" if column.show else "l" for column in table.shown.values())
    cells = table.cells(r"\textbf{{{}}}".format, lambda text: text.translate(_LATEX))
    caption = table.caption.translate(_LATEX)
    return cells.to_latex(index=False, caption=caption, column_format=sides)


def score_format(metric: str) -> str:
    """How a score is written: accuracy in percent, what has no such scale with four digits."""
    return ".1%" if metric == "accuracy" else "#.4g"


def _show(column: Column, value: Any) -> str:
    if value is None or value != value:  # NaN
        return NOTHING
    return column.show(value) if callable(column.show) else format(value, column.show)


_MARKDOWN = str.maketrans({letter: f"\\{letter}" for letter in "\\`*_[]<>|"} | {"\n": " "})
_LATEX = str.maketrans(
    {letter: f"\\{letter}" for letter in "&%$#_{}"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    | {"–": "--", "±": r"$\pm$", "λ": r"$\lambda$", "ρ": r"$\rho$", "η": r"$\eta$"}
)
