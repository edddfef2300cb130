import html.parser
import re
import subprocess
import sys

import pytest

from deltafl.report import (
    Code,
    Column,
    Facts,
    Listing,
    Page,
    Section,
    Table,
    heat_map,
    inspect_figure,
    inspect_page,
    lambda_curves,
    layer_profile,
    quickstart_page,
    render,
    rounds_curve,
    search_page,
    task_bars,
    to_csv,
    to_latex,
    to_markdown,
)
from deltafl.report.lines import draw_lines
from deltafl.report.marks import decimals, shorten, spread, without_common_start
from deltafl.report.theme import TONES
from report_samples import inspect_result, quickstart_result

TABLE = Table(
    [
        Column("model"),
        Column("mean, %", "percent", best="max"),
        Column("steps", "number", 0),
        Column("loss", "significant", 2, "min"),
    ],
    [
        ["single_task", 0.99, 60, 0.1],
        ["a|b & <c>", 0.9124, 240, 0.123],
        ["fedgma", 0.91239, None, 0.5],
    ],
    "Tested *once*, 50% held out",
    reference=(0,),
)
VOID = {"meta", "link", "br"}


class Tree(html.parser.HTMLParser):
    """Checks that tags nest, and collects headings, ids, outside addresses and the text of cells."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.references: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.ids += [value for name, value in attrs if name == "id" and value]
        self.references += [
            value for name, value in attrs if name in ("src", "href", "xlink:href") and value
        ]
        self.references += [
            f"#{i}" for _, value in attrs for i in re.findall(r"url\(#([^)]+)\)", value or "")
        ]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if data.strip():
            self.words.append(data.strip())


@pytest.fixture(scope="module")
def pages() -> dict[str, Page]:
    result = quickstart_result()
    searched = {key: value for key, value in result.items() if key != "training"}
    return {
        "quickstart": quickstart_page(result),
        "search": search_page(searched),
        "inspect": inspect_page(inspect_result()),
    }


@pytest.mark.parametrize("name", ["quickstart", "search", "inspect"])
def test_a_page_is_well_formed_and_self_contained(pages, name):
    text = render(pages[name])
    tree = Tree(text)
    headings = [tag for tag in tree.tags if re.fullmatch(r"h\d", tag)]
    assert headings[0] == "h1"
    assert set(headings[1:]) == {"h2"}
    assert tree.tags.count("title") == 1
    assert tree.tags.count("caption") == tree.tags.count("table") > 0
    assert tree.tags.count("svg") == 2 * tree.tags.count("figure") > 0
    assert "script" not in tree.tags
    assert len(tree.ids) == len(set(tree.ids))
    assert {r for r in tree.references if r != "data:,"} <= {f"#{i}" for i in tree.ids}
    assert not re.search(r"@import|url\((?!#)", text)


def test_what_a_user_wrote_is_text_and_not_markup():
    evil = '<script>alert(\'x\')</script> & "q" id="z" $x^2$'
    page = Page(
        evil,
        evil,
        [
            Section(
                evil,
                evil,
                [
                    Facts([(evil, evil)]),
                    Listing([evil]),
                    Code(evil),
                    Table([Column(evil)], [[evil]], evil),
                    rounds_curve({evil: [(1, 0.5)], "other": [(1, 0.6)]}),
                ],
            )
        ],
    )
    tree = Tree(render(page))
    assert "script" not in tree.tags
    assert tree.words.count(evil) >= 8


def test_text_between_backticks_is_code_and_a_lone_backtick_is_itself():
    text = render(Page("t", "use `a < b` now", [Section("h", "one ` only\n\nsecond")]))
    assert "use <code>a &lt; b</code> now" in text
    assert "<p>one ` only</p>\n<p>second</p>" in text


def test_best_is_as_shown_and_never_a_reference_row():
    text = render(Page("t", "", [Section("h", "", [TABLE])]))
    assert re.findall(r"<strong>(.*?)</strong>", text) == ["91.2", "0.12", "91.2"]
    assert text.count('class="reference"') == 1


def test_markdown_exactly():
    assert to_markdown(TABLE) == (
        "Tested *once*, 50% held out\n\n"
        "| model | mean, % | steps | loss |\n"
        "| :-- | --: | --: | --: |\n"
        "| single\\_task | 99.0 | 60 | 0.1 |\n"
        "| a\\|b & \\<c\\> | **91.2** | 240 | **0.12** |\n"
        "| fedgma | **91.2** | – | 0.5 |\n"
    )


def test_csv_keeps_full_numbers():
    table = Table([Column("a,b"), Column("x", "percent")], [['say "hi"', 1 / 3], ["y", None]], "")
    assert to_csv(table) == '"a,b",x\n"say ""hi""",0.3333333333333333\ny,\n'


def test_latex_exactly():
    assert to_latex(TABLE) == "\n".join(
        [
            r"\begin{table}",
            r"\centering",
            r"\caption{Tested *once*, 50\% held out}",
            r"\begin{tabular}{lrrr}",
            r"\toprule",
            r"model & mean, \% & steps & loss \\",
            r"\midrule",
            r"single\_task & 99.0 & 60 & 0.1 \\",
            r"\midrule",
            r"a|b \& <c> & \textbf{91.2} & 240 & \textbf{0.12} \\",
            r"fedgma & \textbf{91.2} & -- & 0.5 \\",
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
            "",
        ]
    )


def test_a_row_of_another_length_is_refused():
    with pytest.raises(ValueError, match="row 1 has 1 cells, not 2"):
        Table([Column("a"), Column("b")], [["x", "y"], ["x"]], "t")


CURVE = [(0.1, 0.5), (0.5, 0.9), (1.0, 0.4)]
MATRIX = [[1.0, -0.12, None], [-0.12, 1.0, -0.001], [float("nan"), -0.001, 1.0]]
CHARTS = {
    "lambda": (
        lambda: lambda_curves(
            {"median": CURVE, "fedavg": CURVE, "fedgma": [(0.1, 0.6)]}, {"median": 0.5}, 0.45
        ),
        ["median = fedavg", "fedgma", "base (unmerged)", "scaling coefficient λ"],
    ),
    "bars": (
        lambda: task_bars(
            {"base": {"mnist": 0.1, "cars": 0.2}, "fedgma": {"mnist": 0.9}}, reference=["base"]
        ),
        ["mnist", "cars", "fedgma", "base"],
    ),
    "heat": (
        lambda: heat_map(["mnist", "svhn", "cars"], MATRIX),
        ["mnist", "svhn", "cars", "−0.12", "0.00", "–"],
    ),
    "layers": (
        lambda: layer_profile({"a": [("embed", 1.0), ("head", 90.0)], "b": [["embed", 2]]}),
        ["embed", "head", "a", "b"],
    ),
    "rounds": (
        lambda: rounds_curve({"sparse": CURVE, "dense": CURVE}, "gigabytes"),
        ["sparse", "dense", "gigabytes"],
    ),
}


@pytest.mark.parametrize("name", CHARTS)
def test_a_chart_names_what_it_shows_and_is_the_same_each_time(name):
    draw, labels = CHARTS[name]
    figure = draw()
    for svg in (figure.svg, figure.narrow):
        shown = re.findall(r"<text[^>]*>([^<]*)</text>", svg)
        assert set(labels) <= set(shown)
        assert "<style" not in svg
        colours = set(re.findall(r"#[0-9a-f]{6}\b(?!\))", svg))
        assert colours <= {"#000000"}, "a colour that does not follow the page's theme"
    assert figure.alt
    assert draw() == figure


def test_a_score_that_is_missing_is_no_bar_of_zero():
    figure = task_bars({"a": {"mnist": 0.5, "cars": 0.25}, "b": {"mnist": 0.75}})
    assert sorted(re.findall(r">(\d+\.\d)</text>", figure.narrow)) == ["25.0", "50.0", "75.0"]


def test_pages_are_the_same_byte_for_byte_in_another_process(pages):
    code = (
        "import sys; sys.path.insert(0, 'tests'); from report_samples import quickstart_result\n"
        "from deltafl.report import quickstart_page, render\n"
        "sys.stdout.buffer.write(render(quickstart_page(quickstart_result())).encode())\n"
        "assert 'torch' not in sys.modules and 'matplotlib.pyplot' not in sys.modules"
    )
    root = __file__.rsplit("/tests/", 1)[0]
    again = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, cwd=root)
    assert again.stdout.decode() == render(pages["quickstart"])


def test_the_quickstart_tells_the_numbers(pages):
    words = " ".join(Tree(render(pages["quickstart"])).words)
    for told in (
        "97.3",
        "52.5",
        "88.8%",
        "steps 8-fold",
        "learning rate 10-fold",
        "fedavg (= task_arithmetic)",
        "ρ 0.6, λ 0.5",
    ):
        assert told in words
    assert "Validation data chose the rule fedgma" in words


def test_a_search_without_references_curves_or_scores_still_has_a_page():
    row = {
        "rule": "median",
        "params": {},
        "scaling_coef": 0.3,
        "val": None,
        "test": {"cars": 0.5},
        "mean": 0.5,
    }
    page = search_page({"title": "t", "tasks": ["cars"], "rows": [{**row, "normalized": None}]})
    assert "50.0" in Tree(render(page)).words


def test_one_model_can_be_inspected():
    page = inspect_page(
        {"models": ["a"], "norms": {"a": 1.5}, "cosine": {"names": ["a"], "matrix": [[1.0]]}}
    )
    assert "1.5" in Tree(render(page)).words


def test_the_inspect_figure_is_png_or_svg():
    png, svg = inspect_figure(inspect_result()), inspect_figure(inspect_result(), "svg")
    assert png.startswith(b"\x89PNG")
    assert png == inspect_figure(inspect_result())
    assert svg.startswith(b"<svg")
    assert b"sun397" in svg


def test_labels_are_spread_apart_in_order_and_stay_put_where_there_is_room():
    assert spread([0.9, 0.1, 0.5], 0.1) == [0.9, 0.1, 0.5]
    placed = spread([0.99, 0.98, 0.97, 0.2], 0.05)
    assert placed == pytest.approx([1.0, 0.95, 0.9, 0.2])
    assert spread([], 0.1) == []


def test_names_are_cut_in_the_middle_and_lose_a_long_common_start():
    assert shorten("clip-vit-b32-sun397", 11) == "clip-…un397"
    assert shorten("short", 5) == "short"
    assert without_common_start(["clip-vit-cars", "clip-vit-cats"]) == ["…cars", "…cats"]
    assert without_common_start(["a-cars", "a-cats"]) == ["a-cars", "a-cats"]
    assert without_common_start(["clip-vit-", "clip-vit-x"]) == ["clip-vit-", "clip-vit-x"]
    assert [decimals(v, brief=True) for v in (-0.001, 0.5, -0.25, 1.0)] == [
        ".00",
        ".50",
        "−.25",
        "1.00",
    ]


def _luminance(colour: str) -> float:
    """Relative luminance, WCAG 2.2."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return sum(weight * p for weight, p in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def _contrast(one: str, other: str) -> float:
    light, dark = sorted((_luminance(one), _luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_colours_are_legible(theme):
    colour = {role: getattr(tone, theme) for role, tone in TONES.items()}
    for role in colour:
        if role.startswith("series-") or role == "reference-1":
            assert _contrast(colour[role], colour["paper"]) >= 3, role
    for role in ("ink", "muted", "accent"):
        assert (
            min(_contrast(colour[role], colour[ground]) for ground in ("paper", "card")) >= 4.5
        ), role
    for fill in ("positive", "negative"):
        assert _contrast(colour["on-fill"], colour[fill]) >= 4.5, fill
    assert len({tone.light for tone in TONES.values()}) == len(TONES), (
        "a light colour stands for its role"
    )


@pytest.mark.parametrize(
    ("places", "whole"), [((2, 3), True), ((2.0, 4.0), True), ((0.5, 2), False)]
)
def test_what_is_counted_has_whole_ticks(places, whole):
    drawing = draw_lines({"a": [(x, 0.5) for x in places]}, 800, "score", "models merged")
    assert all(float(tick).is_integer() for tick in drawing.axes[0].get_xticks()) == whole
