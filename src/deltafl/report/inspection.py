"""The page and the figure of `deltafl inspect`: how different several fine-tuned models are."""

from typing import TYPE_CHECKING, Literal

from deltafl.report.grids import (
    draw_heat_map,
    draw_layer_profile,
    heat_map,
    heat_map_height,
    layer_profile,
)
from deltafl.report.marks import legend_below
from deltafl.report.page import Column, Listing, Page, Section, Table
from deltafl.report.parts import Result, cosine_figure, differences, training_table
from deltafl.report.svg import WIDE, blank, to_png, to_svg

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Drawing


def inspect_page(result: Result) -> Page:
    """Advice first, then the numbers it follows from."""
    models = list(result["models"])
    sections = [Section("Advice", "", [Listing(result["advice"])])] if result.get("advice") else []
    norms = result["norms"]
    table = Table(
        [Column("model"), Column("length of the delta", "significant", 4)],
        [[model, norms[model]] for model in models],
        "Length (L2 norm) of every delta: how far fine-tuning moved the model.",
    )
    sections.append(Section("How far each model moved", "", [table]))
    if result.get("training"):
        text = differences(result["training"])
        sections.append(
            Section("How they were trained", text, [training_table(result["training"])])
        )
    if len(models) > 1:
        directions = [cosine_figure(result["cosine"])]
        signs = result.get("sign_agreement")
        if signs:
            caption = (
                "Share of weights that two deltas move the same way: 0.5 is what chance gives. "
                "Colour is relative to the strongest pair."
            )
            figure = heat_map(
                signs["names"], signs["matrix"], neutral=0.5, what="Sign agreement", caption=caption
            )
            directions.append(figure)
        sections.append(Section("Whether they move the same way", "", directions))
    if result.get("layers"):
        caption = "Length of the delta in every layer. A model far to the right dominates a plain mean there."
        sections.append(
            Section("Where they changed", "", [layer_profile(result["layers"], caption=caption)])
        )
    lead = f"{len(models)} models fine-tuned from one base, compared by their deltas: the weights after minus before."
    return Page(result.get("title", "How different are these models?"), lead, sections)


def inspect_figure(result: Result, kind: Literal["svg", "png"] = "png") -> bytes:
    """Cosines and norms per layer in one image."""

    def draw(width: int) -> "Drawing":
        names, layers = result["cosine"]["names"], result.get("layers", {})
        top = heat_map_height(names, width) + 30
        rows = max(map(len, layers.values()), default=0)
        bottom = (80 + min(26 * rows, 900) + 11 * len(layers)) if rows else 0
        drawing = blank(width, top + bottom)
        panels = (
            drawing.subplots(2, height_ratios=(top, bottom)) if rows else [drawing.add_subplot()]
        )
        draw_heat_map(panels[0], names, result["cosine"]["matrix"], width)
        panels[0].set_title("Cosine between deltas", pad=36)
        if rows:
            draw_layer_profile(panels[1], layers, width)
            panels[1].set_title("Norm of the delta, layer by layer")
            legend_below(drawing, panels[1], columns=4)
        return drawing

    return to_png(draw, WIDE) if kind == "png" else to_svg(draw, WIDE).encode()
