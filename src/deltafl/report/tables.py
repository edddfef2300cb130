"""Records as a table, and the ways to write it: HTML (by the page), Markdown, CSV, LaTeX."""

import tomllib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from jinja2.filters import do_filesizeformat

Record = Mapping[Any, Any]
NOTHING = "–"


def read_data(name: str) -> dict[str, Any]:
    """A TOML file of this folder."""
    return tomllib.loads(Path(__file__).with_name(f"{name}.toml").read_text(encoding="utf-8"))


COLUMNS = read_data("columns")


class Column(NamedTuple):
    """How one key of the records is shown.

    show: a format specification of numbers (".1%", ",.0f") or a function of the value; "" is text.
    best: whether the largest value is marked, among the rows that are no reference.
    """

    title: str
    show: str | Callable[[Any], str] = ""
    best: bool = False

    def text(self, value: Any) -> str:
        """A value as it is shown."""
        if value is None or value != value:  # NaN
            return NOTHING
        return self.show(value) if callable(self.show) else format(value, self.show)


def columns_of(table: str, metric: str = "") -> dict[str, Column]:
    """The columns that columns.toml gives a table: key of a record -> column."""
    shows = {
        "score": score_format(metric),
        "bytes": do_filesizeformat,
        "points": lambda share: f"{100 * share:+.2f}",
        "count": lambda items: str(len(items)),
    }
    return {
        key: Column(title.format(metric=metric), *(shows.get(how, how) for how in rest))
        for key, (title, *rest) in COLUMNS[table].items()
    }


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
    def frame(self) -> pd.DataFrame:
        """The columns that are not empty."""
        frame = pd.DataFrame(self.rows, columns=[*self.columns], dtype=object)
        return frame.dropna(axis="columns", how="all")

    @property
    def shown(self) -> list[Column]:
        """How each of these is shown."""
        return [self.columns[key] for key in self.frame]

    @property
    def references(self) -> list[bool]:
        """For each row whether it is a reference."""
        texts = [key for key, column in self.columns.items() if not column.show]
        return [any(row.get(key) in self.reference for key in texts) for row in self.rows]

    def cells(
        self, mark: Callable[[str], str] = str, escape: Callable[[str], str] = str
    ) -> pd.DataFrame:
        """The texts of the cells, escaped; those that show their column's best value are marked."""
        cells, rivals = [], [not reference for reference in self.references]
        for column, (_, values) in zip(self.shown, self.frame.items(), strict=True):
            known = values.loc[rivals].dropna()
            best = column.text(max(known)) if column.best and len(known) else None
            texts = zip(map(column.text, values), rivals, strict=True)
            cells.append([mark(escape(t)) if r and t == best else escape(t) for t, r in texts])
        titles = [escape(column.title) for column in self.shown]
        return pd.DataFrame(cells, index=titles, dtype=object).T


def to_markdown(table: Table) -> str:
    """A GitHub table with the caption above it, numbers to the right, the best in bold."""
    cells = table.cells("**{}**".format, lambda text: text.translate(_MARKDOWN))
    sides = [" --: " if column.show else " :-- " for column in table.shown]
    head, *rows = [f"| {' | '.join(row)} |" for row in (cells, *cells.to_numpy())]
    lines = [*[table.caption, ""] * bool(table.caption), head, f"|{'|'.join(sides)}|", *rows, ""]
    return "\n".join(lines)


def to_csv(table: Table) -> str:
    """RFC 4180 with a header; numbers in full (shares, not percent), nothing is an empty field."""
    titles = [column.title for column in table.shown]
    return table.frame.to_csv(index=False, header=titles, lineterminator="\n")


def to_latex(table: Table) -> str:
    """A `table` environment for the booktabs package, the best in bold."""
    sides = "".join("r" if column.show else "l" for column in table.shown)
    cells = table.cells(r"\textbf{{{}}}".format, lambda text: text.translate(_LATEX))
    caption = table.caption.translate(_LATEX)
    return cells.to_latex(index=False, caption=caption, column_format=sides)


SHARES = {"accuracy", "exact match", "pass@1", "instructions followed"}


def score_format(metric: str) -> str:
    """How a score is written: a share of examples in percent, what is none with four digits."""
    return ".1%" if metric in SHARES else "#.4g"


_MARKDOWN = str.maketrans({letter: f"\\{letter}" for letter in "\\`*_[]<>|"} | {"\n": " "})
_LATEX = str.maketrans(
    {letter: f"\\{letter}" for letter in "&%$#_{}"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    | {"–": "--", "±": r"$\pm$", "λ": r"$\lambda$", "ρ": r"$\rho$", "η": r"$\eta$"}
)
