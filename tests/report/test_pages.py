import html.parser
import re
import subprocess
import sys
from functools import cache
from typing import Any

import pytest

import report_samples as samples
from deltafl import report
from deltafl.report.page import Page, to_html

LAYERS = {f"layers.{i}.{part}.weight": (i, 8) for i in range(3) for part in "qkv"}
PAGES = {
    "quickstart": lambda: report.search_page(samples.quickstart_result(), story=True),
    "search": lambda: report.search_page(samples.quickstart_result()),
    "federated": lambda: report.run_page(*samples.federated_result()),
    "centralized": lambda: report.run_page(*samples.centralized_result()),
    "inspect": lambda: report.inspect_page(samples.inspect_result()),
    "mask": lambda: report.mask_page(samples.mask_result({"stem.weight": (0, 0), **LAYERS})),
    "shards": lambda: report.shards_page(samples.shards_result([[3, 0, 2], [0, 4, 1]])),
    "comparison": lambda: report.comparison_page(samples.comparison_result()),
}
VOID = {"meta", "link", "br"}


class Tree(html.parser.HTMLParser):
    """Checks that tags nest, and collects tags, ids, outside addresses and texts."""

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
        self.references += [v for n, v in attrs if n in ("src", "href", "xlink:href") and v]
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
        if data.strip() and self.open[-1] != "style":
            self.words.append(" ".join(data.split()))


@cache
def html_of(name: str) -> str:
    return to_html(PAGES[name]())


def words(page: Page) -> str:
    return " ".join(Tree(to_html(page)).words)


@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_well_formed_and_self_contained(name):
    text = html_of(name)
    tree = Tree(text)
    headings = [tag for tag in tree.tags if re.fullmatch(r"h\d", tag)]
    assert headings[0] == "h1"
    assert set(headings[1:]) == {"h2"}
    assert tree.tags.count("title") == 1
    assert tree.tags.count("table") > 0
    assert tree.tags.count("svg") == tree.tags.count("figure") > 0
    assert "script" not in tree.tags
    assert len(tree.ids) == len(set(tree.ids))
    outside = {r for r in tree.references if not r.startswith("data:")}
    assert outside <= {f"#{i}" for i in tree.ids}
    assert not re.search(r"@import|url\((?!#)", text)
    assert not {"None", "nan", "inf"} & set(re.findall(r"\w+", " ".join(tree.words))) - {"None"}


def test_what_a_user_wrote_is_text_and_not_markup():
    evil = '<script>alert(\'x\')</script> & "q" id="z_1" $x^2$'

    def poisoned(value: Any) -> Any:
        if isinstance(value, dict):
            return {evil if k == "plain" else k: poisoned(v) for k, v in value.items()}
        if isinstance(value, list):
            return [poisoned(one) for one in value]
        return evil if value in ("plain", "fedgma") else value

    result = {
        **poisoned(samples.quickstart_result()),
        "title": evil,
        "command": evil,
        "versions": {evil: evil},
    }
    tree = Tree(to_html(report.search_page(result)))
    assert "script" not in tree.tags
    assert tree.words.count(evil) >= 6
    assert sum('id="z_1" $x^2$' in word for word in tree.words) >= 9


def test_pages_are_the_same_byte_for_byte_in_another_process():
    code = (
        "import sys; sys.path.insert(0, 'tests'); from report_samples import quickstart_result\n"
        "from deltafl.report import search_page, page_files\n"
        "files = page_files(search_page(quickstart_result()))\n"
        "sys.stdout.buffer.write(files['report.html'])\n"
        "assert 'torch' not in sys.modules and 'matplotlib.pyplot' not in sys.modules"
    )
    root = __file__.rsplit("/tests/", 1)[0]
    again = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, cwd=root)
    assert again.stdout == html_of("search").encode()


@pytest.mark.parametrize(
    ("name", "files"),
    [
        ("search", {"report.html", "table.md", "table.csv", "table.tex"}),
        ("federated", {"report.html", "figure.png"}),
        ("inspect", {"report.html", "figure.png"}),
        ("mask", {"report.html", "figure.png"}),
        ("shards", {"report.html", "figure.png"}),
    ],
)
def test_what_is_written_beside_a_page(name, files):
    assert report.page_files(PAGES[name]()).keys() == files


def test_a_comparison_writes_a_folder_for_each_suite_and_study():
    files = report.page_files(PAGES["comparison"]())
    tables = {name for name in files if name.endswith(".csv")}
    assert {f"{name}/table.csv" for name in ("heterogeneity", "negation", "analogy")} <= tables
    assert "training-heterogeneity/relations.csv" in tables
    figures = {name.split("/")[1] for name in files if name.endswith(".png")}
    assert figures == {
        "by_round.png", "by_bytes.png", "gain_by_steps.png", "gain_by_norm.png", "by_size.png",
        "by_lambda.png", "by_task.png",
    }  # fmt: skip


def test_the_quickstart_tells_the_numbers():
    told = " ".join(Tree(html_of("quickstart")).words)
    for part in ("97.3", "52.5", "88.8%", "steps 8-fold", "learning rate 10-fold", "ρ 0.6, λ 0.5"):
        assert part in told
    assert "Validation data chose the rule fedgma" in told
    assert "task_arithmetic = fedavg" in told


def test_a_task_may_be_called_as_a_column_is():
    result = samples.quickstart_result()
    for row in result["rows"]:
        row["test"] = {"mean" if t == "plain" else t: score for t, score in row["test"].items()}
    table = report.results_table(result | {"tasks": ["mean", *result["tasks"][1:]]})
    assert table.cells().iloc[0, [1, 3]].tolist() == ["97.3%", "98.4%"]


def test_a_search_tells_of_its_race_and_of_what_others_publish():
    result = samples.quickstart_result() | {"strategy": "racing", "reference": {"RegMean": 0.71}}
    result |= {"examples": {"evaluated": 1500, "exhaustive": 6000}}
    result |= {"candidates": [{"dropped_at": None}, {"dropped_at": 2}, {"dropped_at": 3}]}
    told = words(report.search_page(result))
    assert "2 of 3 candidates were dropped" in told
    assert "(4.0 times fewer)" in told
    assert "RegMean – 71.0%" in told
    assert "not run here" in told


def test_a_score_that_is_no_share_is_a_plain_number():
    result = samples.quickstart_result() | {"metric": "log-likelihood", "criterion": "absolute"}
    for row in result["rows"]:
        row |= {
            "test": {t: -1.5 * s for t, s in row["test"].items()},
            "mean": -1.23456,
            "val": -2.5,
        }
        row["normalized"] = None
    for page in (report.search_page(result), report.run_page(*samples.centralized_result())):
        told = words(page)
        assert "%" not in told
        assert "log-likelihood" in told
    assert "-1.235" in words(report.search_page(result))
    assert "normalised" not in words(report.search_page(result)).lower()
    assert "-0.8125" in words(report.run_page(*samples.centralized_result()))


def test_a_run_tells_bytes_and_shows_an_even_choice_of_many_rounds():
    page = report.run_page(*samples.federated_result())
    told = words(page)
    for part in (
        "20 clients, 25 % of them in each of 100 rounds", "No update was left out.", "150.0 MB", "600.0 MB",
        "Of 1,000 parameters 500 were trained", "sparse.sparsity_ratio 0.5", "Every 3th of 100 rounds",
    ):  # fmt: skip
        assert part in told
    assert "digit, digit" not in told.replace("'", "")
    rounds = [row["round"] for row in page.values["steps"].rows]
    assert (rounds[:3], rounds[-1], len(rounds)) == ([0, 3, 6], 100, 35)
    assert page.values["steps"].rows[0]["bytes_up"] == 300_000
    assert "being NaN or Inf: 3." in words(
        report.run_page(*samples.federated_result(failed_updates=3))
    )


def test_a_run_that_was_not_trained_has_a_page():
    result, rows = samples.federated_result()
    assert "before the first round" in words(report.run_page(result | {"best_round": 0}, rows[:1]))


def test_tensors_that_differ_in_their_layer_are_one_kind():
    result = samples.mask_result(
        {
            "stem.weight": (1, 8),
            "layer1.0.conv2.weight": (2, 8),
            "layer1.1.conv2.weight": (3, 8),
            "0.bias": (0, 0),
        }
    )
    assert report.kinds_table(result).cells().to_numpy().tolist() == [
        ["stem.weight", "1", "1", "8", "12.50%"],
        ["layer1.*.conv2.weight", "2", "5", "16", "31.25%"],
        ["*.bias", "1", "0", "0", "–"],
    ]


@pytest.mark.parametrize(("layers", "count"), [(0, 1), (1, 3), (24, 16), (2, 130)])
def test_a_mask_of_any_depth_is_drawn(layers, count):
    names = [f"blocks.{i}.part<{k}>.weight" for i in range(layers) for k in range(count)]
    page = report.mask_page(
        samples.mask_result({name: (i % 8, 8) for i, name in enumerate(names or ["weight"])})
    )
    text = to_html(page)
    assert text.count("<svg") == 1
    assert ("The first 100 of 130 kinds" in text) == (count == 130)
    assert "part<" not in text
    assert "<code>layers.*.k.bias</code> in 2 layers: softmax is shift-invariant" in text


@pytest.mark.parametrize(("clients", "classes"), [(1, 1), (3, 2), (30, 12), (130, 45), (100, 100)])
def test_any_number_of_clients_is_drawn_and_stays_small(clients, classes):
    counts = [[(i * classes + k) % 7 + (k == 0) for k in range(classes)] for i in range(clients)]
    text = to_html(report.shards_page(samples.shards_result(counts)))
    assert len(text) < 200_000
    assert ("The first 100 of 130 clients are shown" in text) == (clients == 130)
    assert "class <" not in text


def test_one_model_can_be_inspected():
    result = samples.inspect_result()
    result |= {
        "models": ["a"],
        "training": [{"model": "a", "norm": 1.5}],
        "layers": {"a": [["x", 1.5]]},
    }
    result |= {key: {"names": ["a"], "matrix": [[None]]} for key in ("cosine", "sign_agreement")}
    told = words(report.inspect_page(result))
    assert "1.5" in told
    assert "Whether they move" not in told


def test_a_suite_says_what_failed_and_explains_a_best_round_of_zero():
    suites = {"aggregators": samples.suite_result(1, "needs 3 models", best_round=0)}
    suites["sparsity"] = samples.suite_result(0, "needs 3 models")
    told = words(report.comparison_page(samples.comparison_result(suites=suites, studies={})))
    assert "krum: needs 3 models" in told
    assert "before training" in told
    assert "before training" not in html_of("comparison")
