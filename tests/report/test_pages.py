import html.parser
import re
import tomllib
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import report_samples as samples
from checkpoint_files import python
from deltafl import report
from deltafl.experiments import STUDIES, SUITES
from deltafl.report.page import Page, to_html

LAYERS = {f"layers.{i}.{part}.weight": (i, 8) for i in range(3) for part in "qkv"}
PAGES = {
    "quickstart": lambda: report.search_page(samples.quickstart_result(), story=True),
    "search": lambda: report.search_page(samples.quickstart_result()),
    "race": lambda: report.search_page(samples.race_result()),
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
        inside = (i for _, value in attrs for i in re.findall(r"url\(#([^)]+)\)", value or ""))
        self.references += [f"#{i}" for i in inside]
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
    assert not {"nan", "inf"} & set(re.findall(r"\w+", " ".join(tree.words)))


def test_what_a_user_wrote_is_text_and_not_markup():
    evil = '<script>alert(\'x\')</script> & "q" id="z_1" $x^2$'

    def poisoned(value: Any) -> Any:
        if isinstance(value, dict):
            return {evil if k == "plain" else k: poisoned(v) for k, v in value.items()}
        if isinstance(value, list):
            return [poisoned(one) for one in value]
        return evil if value in ("plain", "fedgma") else value

    result = poisoned(samples.quickstart_result())
    result |= {"title": evil, "command": evil, "versions": {evil: evil}}
    tree = Tree(to_html(report.search_page(result)))
    assert "script" not in tree.tags
    assert tree.words.count(evil) >= 6
    assert sum('id="z_1" $x^2$' in word for word in tree.words) >= 9


def test_pages_are_the_same_byte_for_byte_in_another_process():
    code = (
        "import sys; from report_samples import quickstart_result\n"
        "from deltafl.report import search_page, page_files\n"
        "files = page_files(search_page(quickstart_result()))\n"
        "sys.stdout.buffer.write(files['report.html'])\n"
        "assert 'torch' not in sys.modules and 'matplotlib.pyplot' not in sys.modules"
    )
    assert python(code, check=True, encoding="utf-8").stdout == html_of("search")


CHARTS = {
    "heterogeneity": ("by_round", "by_bytes"), "training-heterogeneity": ("gain_by_steps", "gain_by_norm"),
    "data-heterogeneity": ("by_size",), "scaling-coef": ("by_lambda",), "examples": ("by_examples",),
    "negation": ("by_task",), "analogy": ("by_task",),
}  # fmt: skip


BESIDE = {
    "search": ({"table"}, set()),
    **{name: (set(), {"figure.png"}) for name in ("federated", "inspect", "mask", "shards")},
    "comparison": (
        {*(f"{name}/table" for name in CHARTS), "training-heterogeneity/relations"},
        {f"{name}/{chart}.png" for name, charts in CHARTS.items() for chart in charts},
    ),
}


@pytest.mark.parametrize("name", BESIDE)
def test_what_is_written_beside_a_page(name):
    tables, figures = BESIDE[name]
    texts = {f"{table}.{suffix}" for table in tables for suffix in ("md", "csv", "tex")}
    assert report.page_files(PAGES[name]()).keys() == {"report.html", *texts, *figures}


TOLD = {
    "quickstart": "97.3|52.5|88.8%|steps 8-fold|learning rate 10-fold|ρ 0.6, λ 0.5|"
                  "Validation data chose the rule fedgma|task_arithmetic = fedavg",
    "race": "2 of 3 candidates were dropped|(4.0 times fewer)|RegMean – 71.0%|not run here",
    "federated": "20 clients, 25 % of them in each of 100 rounds|No update was left out.|150.0 MB|600.0 MB|"
                 "Of 1,000 parameters 500 were trained|sparse.sparsity_ratio 0.5|Every 3th of 100 rounds",
    "centralized": "-0.8125|log-likelihood|4 epochs",
    "comparison": "krum: too few|the control task is digits",
}  # fmt: skip


@pytest.mark.parametrize("name", TOLD)
def test_a_page_tells_the_numbers(name):
    told = " ".join(Tree(html_of(name)).words)
    assert [part for part in TOLD[name].split("|") if part not in told] == []
    texts = tomllib.loads((Path(report.__file__).parent / "questions.toml").read_text())
    assert {*SUITES, *STUDIES} <= texts.keys(), "every suite and study has its question"


def test_a_task_may_be_called_as_a_column_is():
    result = samples.quickstart_result()
    for row in result["rows"]:
        row["test"] = {"mean" if t == "plain" else t: score for t, score in row["test"].items()}
    table = report.results_table(result | {"tasks": ["mean", *result["tasks"][1:]]})
    assert table.cells().iloc[0, [1, 3]].tolist() == ["97.3%", "98.4%"]


def test_a_score_that_is_no_share_is_a_plain_number():
    result = samples.quickstart_result() | {"metric": "log-likelihood", "criterion": "absolute"}
    for row in result["rows"]:
        scores = {task: -1.5 * score for task, score in row["test"].items()}
        row |= {"test": scores, "mean": -1.23456, "val": -2.5, "normalized": None}
    told = words(report.search_page(result))
    assert "%" not in told + words(PAGES["centralized"]())
    assert "-1.235" in told
    assert "normalised" not in told.lower()


def test_a_run_shows_an_even_choice_of_many_rounds():
    page = PAGES["federated"]()
    steps = page.values["steps"].rows
    rounds = [row["round"] for row in steps]
    assert (rounds[:3], rounds[-1], len(rounds)) == ([0, 3, 6], 100, 35)
    assert steps[0]["bytes_up"] == 300_000
    assert "digit, digit" not in words(page).replace("'", "")  # names of classes are no setting
    failed = samples.federated_result(failed_updates=3)
    assert "being NaN or Inf: 3." in words(report.run_page(*failed))
    result, rows = samples.federated_result(best_round=0)
    assert "before the first round" in words(report.run_page(result, rows[:1]))


def test_tensors_that_differ_in_their_layer_are_one_kind():
    layers = {"layer1.0.conv2.weight": (2, 8), "layer1.1.conv2.weight": (3, 8)}
    result = samples.mask_result({"stem.weight": (1, 8), **layers, "0.bias": (0, 0)})
    assert report.kinds_table(result).cells().to_numpy().tolist() == [
        ["stem.weight", "1", "1", "8", "12.50%"],
        ["layer1.*.conv2.weight", "2", "5", "16", "31.25%"],
        ["*.bias", "1", "0", "0", "–"],
    ]


@pytest.mark.parametrize(("layers", "count"), [(0, 1), (1, 3), (24, 16), (2, 130)])
def test_a_mask_of_any_depth_is_drawn(layers, count):
    names = [f"blocks.{i}.part<{k}>.weight" for i in range(layers) for k in range(count)]
    tensors = {name: (i % 8, 8) for i, name in enumerate(names or ["weight"])}
    text = to_html(report.mask_page(samples.mask_result(tensors)))
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
    none = {"names": ["a"], "matrix": [[None]]}
    result = samples.inspect_result() | {
        "models": ["a"], "training": [{"model": "a", "norm": 1.5}], "layers": {"a": [["x", 1.5]]},
        "cosine": none, "sign_agreement": none, "overlap_layers": {},
    }  # fmt: skip
    told = words(report.inspect_page(result))
    assert "Directions shared" not in told
    assert "1.5" in told
    assert "Whether they move" not in told


def test_a_suite_says_what_failed_and_explains_a_best_round_of_zero():
    suites = {"aggregators": samples.suite_result(1, "needs 3 models", best_round=0)}
    suites["sparsity"] = samples.suite_result(0, "needs 3 models")
    told = words(report.comparison_page(samples.comparison_result(suites=suites, studies={})))
    assert "krum: needs 3 models" in told
    assert "before training" in told
    assert "before training" not in html_of("comparison")
