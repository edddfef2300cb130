"""Plain text for the terminal."""

from collections.abc import Sequence


def as_bytes(count: float) -> str:
    """1234567 -> "1.2 MB"."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 1000 or unit == "TB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A plain text table, first column left, the others right."""
    widths = [max(len(r[i]) for r in (columns, *rows)) for i in range(len(columns))]

    def line(row: Sequence[str]) -> str:
        cells = [c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True)]
        return "  ".join([row[0].ljust(widths[0]), *cells]).rstrip()

    return "\n".join(map(line, [columns, ["-" * w for w in widths], *rows]))


def as_score(score: float, ratio_scaled: bool) -> str:
    """0.8321 -> "83.21%" where scores may be divided, as accuracies may; else "0.8321"."""
    return f"{score:.2%}" if ratio_scaled else f"{score:.4f}"
