"""`deltafl suite` from the outside."""

import csv
import json
from pathlib import Path

import pytest

from checkpoint_files import cli, problems_of, refused, succeed
from deltafl.experiments import SUITES, SuiteRecipe
from deltafl.rules.building import delta_rules
from deltafl.sparse.strategies import MASK_STRATEGIES
from report_samples import comparison_result
from tiny_models import vit_file

MODEL = vit_file(num_hidden_layers=1)
SMALL = (
    "--model", MODEL, "--data", "digits", "--num-clients", 8, "--participation-rate", 0.5, "--num-rounds", 2,
    "--local-steps", 2, "--batch-size", 16, "--lr", 0.01, "--nc-values", 2, "--limit", 200,
)  # fmt: skip
TWICE = (*SMALL, "--sparsity-ratios", 0.5, "--num-runs", 2)


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("suite") / "out"
    names = ("heterogeneity", "calibration-rounds")
    succeed("suite", *names, *TWICE, "--calibration-values", 1, 2, "--out", out)
    return out


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list:
    """(names of suites, recipe) of each call of `run_suites`, which runs none of them."""
    calls = []

    def run(names, recipe, *_, **__):
        calls.append((names, recipe))
        return comparison_result()

    monkeypatch.setattr("deltafl.cli.suite.run_suites", run)
    return calls


def test_a_suite_leaves_tables_of_means_and_spreads_figures_and_a_report(suite: Path):
    files = ["by_bytes.png", "by_round.png", "table.csv", "table.md", "table.tex"]
    for name in ("heterogeneity", "calibration-rounds"):
        assert sorted(f.name for f in (suite / name).iterdir()) == files
    page = (suite / "report.html").read_text()
    assert all(title in page for title in ("Heterogeneity", "Calibration rounds"))
    with (suite / "heterogeneity" / "table.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["sharding"] for row in rows] == ["IID", "Nc = 2"]
    results = [json.loads(f.read_text()) for f in suite.glob("works/runs/*/result.json")]
    dense = [r for r in results if r["config"]["sparse"]["sparsity_ratio"] == 0]
    for row, kind in zip(rows, ("iid", "non_iid"), strict=True):
        held = [r for r in dense if r["config"]["sharding"]["sharding"] == kind]
        one, two = (result["test_score"] for result in held)
        assert float(row["test accuracy"]) == pytest.approx((one + two) / 2)
        assert float(row["±"]) == pytest.approx(abs(one - two) / 2**0.5)
        assert row["runs"] == "2"


def test_a_row_that_cannot_run_says_why_and_the_others_go_on(tmp_path: Path):
    """Krum needs three models and a round has two clients; event files lie under suite and row."""
    pytest.importorskip("tensorboard")
    few = ("--num-clients", 4, "--nc-values", 5, "--num-rounds", 1, "--tensorboard")
    succeed("suite", "aggregators", *SMALL, *few, "--out", tmp_path / "out")
    found = json.loads((tmp_path / "out" / "suite.json").read_text())["suites"]["aggregators"]
    runs = {row["rule"]: row["runs"] for row in found["rows"] if row["sharding"] == "IID"}
    assert (runs["krum"], runs["median"]) == (0, 1)
    assert any(note.startswith("krum, IID, equal: krum: 2 models") for note in found["notes"])
    events = tmp_path / "out" / "metrics" / "aggregators" / "median, IID, equal" / "seed-0"
    assert len(list(events.iterdir())) == 1


MISTAKES = {
    "heterogeneity --nc-values 2 11": "heterogeneity, Nc = 11: non_iid: nc is 11",
    "calibration-rounds --calibration-values 1 3": "3 calibration rounds of 4 fresh clients",
    "sparsity --mask-file mask": "mask_file is a finished mask",
    "heterogeneity --aggregator krum --num-byzantine 2": "needs at least 2f + 3 = 7 models",
    "heterogeneity --device cuda:7": "cuda:7",
    "heterogeneity --client nowhere:Client": "nowhere",
    "heterogeneity --model no/such/model": "no/such/model",
    "": "name a suite: heterogeneity",
    "heterogenity": 'no suite "heterogenity"; did you mean "heterogeneity"?',
    "all --quick --full": "give one of them",
    "heterogeneity --num-runs 0": "num_runs: must be",
}


@pytest.mark.parametrize(("arguments", "told"), MISTAKES.items(), ids=str)
def test_what_can_be_told_is_told_before_an_older_suite_is_replaced(suite, arguments, told):
    call = ("suite", *SMALL, *arguments.split(), "--overwrite", "--out", suite)
    assert any(told in line for line in refused(suite.parent, *call))


def test_a_suite_none_of_whose_runs_can_be_made_is_an_error(tmp_path: Path):
    head = ("--head", "no/such/head", "--out", tmp_path / "out")
    (problem,) = problems_of(cli("suite", "heterogeneity", *SMALL, *head))
    assert "no/such/head" in problem


def test_a_resumed_suite_repeats_no_run_and_gives_the_same_tables(suite: Path):
    stamps = {f: f.stat().st_mtime_ns for f in suite.glob("works/runs/*/result.json")}
    before = (suite / "heterogeneity" / "table.csv").read_text()
    succeed("suite", "heterogeneity", *TWICE, "--resume", "--out", suite)
    assert {f: f.stat().st_mtime_ns for f in suite.glob("works/runs/*/result.json")} == stamps
    assert (suite / "heterogeneity" / "table.csv").read_text() == before


@pytest.mark.parametrize(
    ("flag", "name"),
    [
        ("--heterogeneity-experiment", "heterogeneity"),
        ("--local-steps-experiment", "local-steps"),
        ("--compare-strategies", "mask-strategies"),
    ],
)
def test_the_spellings_of_the_course_work_start_a_suite(flag, name, tmp_path, asked):
    given = "--nc-values 1 2 --j-values 4 8 --sparsity-ratio 0.8 --num-rounds 3 --quiet"
    call = ("federate", "--model", MODEL, "--data", "digits", flag, *given.split())
    succeed(*call, "--out", tmp_path / "x")
    [((found,), recipe)] = asked
    values = recipe.values
    assert (found, recipe.num_rounds, values.sparsity) == (name, 3, 0.8)
    assert (values.nc_values, values.j_values) == ((1, 2), (4, 8))


def rows(name: str) -> list[dict[str, object]]:
    """The settings of a suite's rows, which a run can have."""
    recipe = SuiteRecipe.of(model=MODEL, data="digits", num_rounds=40)
    found = [settings for _, settings in SUITES[name](recipe)]
    assert all(recipe.replace(**settings) for settings in found)
    return found


def test_every_number_of_local_steps_does_equal_work(asked):
    assert {row["local_steps"] * row["num_rounds"] for row in rows("local-steps")} == {160}
    succeed("suite", "local-steps", "--quick", "--quiet")
    succeed("suite", "local-steps", "--quick", "--j-values", 2, 3, "--quiet")
    (_, quick), (_, given) = asked
    assert {quick.num_rounds * quick.values.j_values[0] % j for j in quick.values.j_values} == {0}
    assert given.values.j_values == (2, 3)


def test_every_strategy_and_rule_is_compared():
    strategies = [row["mask_strategy"] for row in rows("mask-strategies")[1:]]
    assert sorted(strategies) == sorted(MASK_STRATEGIES)
    assert {row["aggregator"] for row in rows("aggregators")} == set(delta_rules())
    assert all(map(rows, SUITES))
