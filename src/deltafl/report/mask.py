"""The page and the figure of `deltafl mask`: what share of each tensor is kept."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from deltafl.report.page import Column, Facts, Figure, Listing, Page, Section, Table
from deltafl.report.svg import NARROW, WIDE, blank, drawn, to_png, to_svg
from deltafl.report.theme import INK, MUTED, ON_FILL, POSITIVE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Drawing

MOST = 60
"""Kinds of tensors in the figure; more would not be read."""

NUMBER = re.compile(r"(?<=\.)\d+(?=\.)|^\d+(?=\.)")


class Part(NamedTuple):
    """One tensor of a kind: the number of its layer (None: it is alone), and its coordinates."""

    layer: int | None
    kept: int
    eligible: int


def kinds(tensors: Sequence[Mapping[str, Any]]) -> dict[str, list[Part]]:
    """Tensors with one name but for the first number in it, `layers.*.attention.q_proj.weight`, in their order."""
    found: dict[str, list[Part]] = {}
    for tensor in tensors:
        number = NUMBER.search(tensor["name"])
        kind = NUMBER.sub("*", tensor["name"], count=1)
        found.setdefault(kind, []).append(
            Part(int(number[0]) if number else None, tensor["kept"], tensor["eligible"])
        )
    return found


def kinds_table(result: Mapping[str, Any]) -> Table:
    """Kept and eligible coordinates of each kind of tensor, over all layers."""
    cells = []
    for kind, parts in kinds(result["tensors"]).items():
        kept, eligible = sum(p.kept for p in parts), sum(p.eligible for p in parts)
        cells.append([kind, len(parts), kept, eligible, kept / eligible if eligible else None])
    columns = [Column("tensor"), *(Column(n, "number", 0) for n in ("tensors", "kept", "eligible"))]
    caption = "Coordinates that train, for each kind of tensor over all its layers."
    return Table([*columns, Column("kept, %", "percent", 2)], cells, caption)


def mask_page(result: Mapping[str, Any]) -> Page:
    """The numbers, the share by layer and kind, what is excluded, every tensor."""
    facts = Facts(
        [
            ("kept coordinates", f"{result['kept']:,}"),
            ("of eligible ones", f"{100 * result['kept'] / result['eligible']:.2f}%"),
            ("eligible coordinates", f"{result['eligible']:,}"),
            ("excluded coordinates", f"{result['parameters'] - result['eligible']:,}"),
            ("untouched tensors", str(sum(not t["kept"] for t in result["tensors"]))),
        ]
    )
    sections = [
        Section("In numbers", "", [facts]),
        Section("Where it is kept", "", [_figure(result)]),
    ]
    if result["excluded"]:
        counts = Counter(
            (NUMBER.sub("*", name, count=1), why) for name, why in result["excluded"].items()
        )
        rows = [
            f"`{kind}`{f' in {n} layers' if n > 1 else ''}: {why}"
            for (kind, why), n in counts.items()
        ]
        text = (
            "These coordinates cannot be kept, whatever the strategy, and do not count as eligible."
        )
        sections.append(Section("What is excluded", text, [Listing(rows)]))
    sections.append(Section("By kind", "", [kinds_table(result)]))
    cells = [
        [t["name"], t["kept"], t["eligible"], _share(t["kept"], t["eligible"])]
        for t in result["tensors"]
    ]
    columns = [Column("tensor"), Column("kept", "number", 0), Column("eligible", "number", 0)]
    every = Table(
        [*columns, Column("kept, %", "percent", 2)], cells, "Every tensor, in the model's order."
    )
    sections.append(Section("Every tensor", "", [every]))
    if result["made"]:
        settings = [[key, str(value)] for key, value in result["made"].items()]
        sections.append(
            Section(
                "How it was made", "", [Table([Column("setting"), Column("value")], settings, "")]
            )
        )
    lead = (
        "A mask says which coordinates of a model train and are sent; all others stay as they are."
    )
    return Page("Which coordinates train?", lead, sections)


def mask_figure(result: Mapping[str, Any], kind: Literal["svg", "png"] = "png") -> bytes:
    """Share kept, kinds of tensors down, layers across."""

    def draw(width: int) -> "Drawing":
        return _draw(result, width)

    return to_png(draw, WIDE) if kind == "png" else to_svg(draw, WIDE).encode()


def _share(kept: int, eligible: int) -> float | None:
    return kept / eligible if eligible else None


def _figure(result: Mapping[str, Any]) -> Figure:
    held = kinds(result["tensors"])
    caption = "Percent of each tensor's eligible coordinates that are kept; the darker, the more. A dash: none."
    if len(held) > MOST:
        caption += f" The first {MOST} of {len(held)} kinds of tensors are shown."
    shares = {
        t["name"]: s
        for t in result["tensors"]
        if (s := _share(t["kept"], t["eligible"])) is not None
    }
    low, high = min(shares, key=shares.__getitem__), max(shares, key=shares.__getitem__)
    alt = (
        f"Share kept of {len(result['tensors'])} tensors: least {100 * shares[low]:.1f}% of {low}, "
    )
    return drawn(
        lambda width: _draw(result, width),
        caption,
        f"{alt}most {100 * shares[high]:.1f}% of {high}.",
    )


def _draw(result: Mapping[str, Any], width: int) -> "Drawing":
    held = dict(list(kinds(result["tensors"]).items())[:MOST])
    layers = sorted({p.layer for parts in held.values() for p in parts if p.layer is not None})
    columns: list[int | None] = (
        [None, *layers] if any(p.layer is None for ps in held.values() for p in ps) else [*layers]
    )
    drawing = blank(width, 90 + 25 * len(held))
    axes = drawing.add_subplot()
    cell = (width - (120 if width <= NARROW else 7.2 * max(map(len, held)))) / len(columns)
    top = max(_share(t["kept"], t["eligible"]) or 0.0 for t in result["tensors"])
    for row, parts in enumerate(held.values()):
        for part in parts:
            _draw_cell(axes, columns.index(part.layer), row, part, top, cell)
    axes.set_xlim(-0.5, len(columns) - 0.5)
    axes.set_ylim(len(held) - 0.5, -0.5)
    axes.set_title("Kept coordinates, %")
    every = max(1, round(26 / cell))
    ticks = [
        i for i, layer in enumerate(columns) if layer is None or layers.index(layer) % every == 0
    ]
    axes.set_xticks(ticks, ["" if columns[i] is None else str(columns[i]) for i in ticks])
    if layers:
        axes.set_xlabel("layer (the * in a name)")
    axes.set_yticks(range(len(held)), [_tail(name, 15 if width <= NARROW else 46) for name in held])
    axes.tick_params(length=0, labelcolor=INK)
    axes.spines[:].set_visible(False)
    return drawing


def _draw_cell(axes: "Axes", column: int, row: int, part: Part, top: float, width: float) -> None:
    """One tensor: a box as dark as its share is, relative to the largest, `top`, and the share where there is room."""
    from matplotlib.patches import Rectangle

    share = _share(part.kept, part.eligible)
    if share is None:
        axes.text(column, row, "–", ha="center", va="center_baseline", color=MUTED, fontsize=10)
        return
    strength = share / top if top else 0.0
    box = Rectangle(
        (column - 0.47, row - 0.45), 0.94, 0.9, facecolor=POSITIVE, alpha=0.05 + 0.95 * strength
    )
    axes.add_patch(box)
    if width >= 26:
        text = f"{100 * share:.0f}" if share == 0 or 100 * share >= 9.95 else f"{100 * share:.1f}"
        ink = ON_FILL if strength > 0.6 else INK
        axes.text(
            column,
            row,
            text,
            ha="center",
            va="center_baseline",
            color=ink,
            fontsize=10 if width < 34 else 11,
        )


def _tail(name: str, most: int) -> str:
    """`name` in at most `most` letters, its beginning left out: layers share theirs."""
    return name if len(name) <= most else f"…{name[1 - most :]}"
