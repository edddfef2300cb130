import re

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure as Drawing

from deltafl.report.figures import FILLS, SERIES, TONES, Figure, chart, heat_map, to_png, to_svg

CURVE = [(0.1, 0.5), (0.5, 0.9), (1.0, 0.4)]
FRAME = pd.DataFrame(
    [[np.nan, -0.12, np.inf], [-0.12, np.nan, -0.001], [0.5, 0.25, np.nan]],
    ["clip-vit-mnist", "clip-vit-svhn", "clip-vit-cars"],
    ["mnist", "svhn", "cars"],
)
LINES = {"sparse": CURVE, "dense": CURVE}
CHARTS = {
    "lines": (
        lambda: chart(LINES, "Score", "λ", level=("base", 0.45), rings={"dense": 0.5}),
        ["Score", "sparse", "dense", "base", "λ"],
    ),
    "marks": (
        lambda: chart({"only": CURVE}, "Gain", "ratio", show="+.1%", joined=False),
        ["Gain", "80%"],
    ),
    "heat": (lambda: heat_map(FRAME, "Cosine"), ["…mnist", "svhn", "−0.12", "−0.00", "–", "0.50"]),
    "nothing": (lambda: chart({}, "Score", "round"), ["Score", "round"]),
    "blank": (lambda: heat_map(FRAME * np.nan, "Cosine"), ["Cosine"]),
}


def drawn(figure: Figure) -> Drawing:
    drawing = Drawing()
    figure.draw(drawing.add_subplot())
    return drawing


@pytest.mark.parametrize("name", CHARTS)
def test_a_chart_names_what_it_shows_and_is_the_same_each_time(name):
    draw, labels = CHARTS[name]
    figure = draw()
    svg = to_svg(figure, "1")
    assert set(labels) <= set(re.findall(r"<text[^>]*>([^<]*)</text>", svg))
    tones = {tone["light"] for tone in TONES.values()}
    assert set(re.findall(r"(?:fill|stroke): (#[0-9a-f]{6})", svg)) <= {*tones, "#ffffff"}
    assert (svg, to_png([figure])) == (to_svg(draw(), "1"), to_png([draw()]))


def test_the_figures_of_a_file_are_one_image():
    one, two = CHARTS["lines"][0](), CHARTS["heat"][0]()
    pixels = [
        int.from_bytes(to_png(figures)[20:24], "big") for figures in ([one], [two], [one, two])
    ]
    assert pixels[2] == pytest.approx(pixels[0] + pixels[1], rel=0.1)


@pytest.mark.parametrize(("places", "whole"), [((0, 3), True), ((2.0, 4.0), True), ((0.5, 2), False)])  # fmt: skip
def test_what_is_counted_has_whole_ticks(places, whole):
    axes = drawn(chart({"a": [(x, 0.5 + 0.1 * x) for x in places]}, "score", "models")).axes[0]
    assert all(float(tick).is_integer() for tick in axes.get_xticks()) == whole


@pytest.mark.parametrize(("last", "scale"), [(7.5, "linear"), (80.5, "log")])
def test_runs_that_end_far_apart_are_drawn_over_a_logarithmic_axis(last, scale):
    lines = {"sparse": [(0, 0.1), (2.5, 0.5)], "dense": [(0, 0.1), (last, 0.9)]}
    axes = drawn(chart(lines, "Score", "MB")).axes[0]
    assert axes.get_xscale() == scale
    assert ("(logarithmic)" in axes.get_xlabel()) == (scale == "log")
    assert len(axes.lines[0].get_xdata()) == (1 if scale == "log" else 2)


def test_no_two_series_look_alike_and_the_best_are_drawn():
    figure = chart({f"run {i}": [(0, 0), (1, i)] for i in range(12)}, "Score", "round")
    drawing = drawn(figure)
    lines = [line for line in drawing.axes[0].lines if len(line.get_xdata())]
    assert len({line.get_color() for line in lines}) == len(lines) == len(SERIES)
    names = [text.get_text() for text in drawing.legends[0].get_texts()]
    assert names == [f"run {i}" for i in range(4, 12)]
    assert "The 8 best of 12 are drawn." in figure.caption
    assert "run 11 11" in figure.alt


def test_a_legend_has_whole_names_and_cells_what_tells_them_apart():
    names = [f"sparsity = 0.{i}" for i in (5, 95)]
    legend = drawn(chart(dict.fromkeys(names, CURVE), "Score", "round")).legends[0]
    assert [text.get_text() for text in legend.get_texts()] == names
    axes = drawn(heat_map(pd.DataFrame([[1.0, 2.0]], columns=names), "t")).axes[0]
    assert [text.get_text() for text in axes.get_xticklabels()] == ["…0.5", "…0.95"]


def test_the_point_that_was_chosen_is_ringed():
    axes = drawn(chart({"a": CURVE}, "Score", "λ", rings={"a": 0.5})).axes[0]
    (ring,) = (line for line in axes.lines if line.get_markersize() > 10 and len(line.get_xdata()))
    assert (ring.get_xdata().tolist(), ring.get_ydata().tolist()) == ([0.5], [0.9])


def test_a_heat_map_is_relative_to_its_largest_or_to_that_of_each_column():
    def strengths(figure: Figure) -> np.ndarray:
        return drawn(figure).axes[0].images[0].get_array()[..., 3]

    frame = pd.DataFrame([[0.2, 2.0], [0.4, 3.0]])
    np.testing.assert_allclose(strengths(heat_map(frame, "t")), 0.06 + 0.94 * frame / 3)
    by_column = strengths(heat_map(frame, "t", neutral=frame.min()))
    np.testing.assert_allclose(by_column, [[0.06, 0.06], [1, 1]])


def luminance(colour: str) -> float:
    """Relative luminance, WCAG 2.2."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return sum(weight * p for weight, p in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one: str, other: str) -> float:
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_colours_are_legible(theme):
    colour = {role: tone[theme] for role, tone in TONES.items()}
    for role in colour:
        if role.startswith("series-"):
            assert contrast(colour[role], colour["paper"]) >= 3, role
    for role in ("ink", "muted", "accent"):
        for ground in ("paper", "card"):
            assert contrast(colour[role], colour[ground]) >= 4.5, role
    for fill in FILLS:
        assert contrast(fill, colour["paper"]) >= 3
        assert contrast(fill, "#ffffff") >= 4.5
    assert len({tone["light"] for tone in TONES.values()}) == len(TONES)
