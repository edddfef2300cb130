"""The words a report is written in: a page of sections, each with text, tables and figures."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Cell = str | float | int | None


@dataclass(frozen=True)
class Column:
    """One column of a table.

    `kind` says how a number is shown: "text" as it is, "percent" as a share times 100, "number" with `digits`
    decimals, "significant" with `digits` significant digits. `best` marks the largest or smallest value.
    """

    name: str
    kind: Literal["text", "percent", "number", "significant"] = "text"
    digits: int = 1
    best: Literal["max", "min"] | None = None


@dataclass(frozen=True)
class Table:
    """Rows of cells under named columns; `None` is an empty cell.

    The rows in `reference` (their positions) are there to compare with: set apart, and never marked as the best.
    """

    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell]]
    caption: str
    reference: Sequence[int] = ()

    def __post_init__(self) -> None:
        for number, row in enumerate(self.rows):
            if len(row) != len(self.columns):
                raise ValueError(
                    f'table "{self.caption}": row {number} has {len(row)} cells, not {len(self.columns)}'
                )


@dataclass(frozen=True)
class Figure:
    """A chart as SVG text; `narrow` is the same chart drawn for a phone. `alt` says in words what it shows."""

    svg: str
    caption: str
    alt: str
    narrow: str = ""


@dataclass(frozen=True)
class Facts:
    """A few numbers worth seeing first: (what it is, value) pairs."""

    pairs: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Listing:
    """A bulleted list; text between backticks is set as code."""

    items: Sequence[str]


@dataclass(frozen=True)
class Code:
    """Lines to type or to copy."""

    text: str


Item = Table | Figure | Facts | Listing | Code


@dataclass(frozen=True)
class Section:
    """A heading, paragraphs (blank lines part them; text between backticks is set as code) and items."""

    heading: str
    text: str = ""
    items: Sequence[Item] = ()


@dataclass(frozen=True)
class Page:
    """A title, a lead paragraph and sections."""

    title: str
    lead: str
    sections: Sequence[Section]
