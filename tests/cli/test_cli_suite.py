"""`deltafl suite` from the outside."""

import csv
import json
from pathlib import Path

import pytest

from checkpoint_files import cli, problems_of, refused, succeed
from deltafl.experiments import SUITES, SuiteRecipe
from deltafl.rules.rule import load_rules
from deltafl.sparse.strategies import MASK_STRATEGIES
from tiny_models import vit_file

MODEL = vit_file(num_hidden_layers=1)
SMALL = (
    "--model", MODEL, "--data", "digits", "--num-clients", 8, "--participation-rate", 0.5, "--num-rounds", 2,
    "--local-steps", 2, "--batch-size", 16, "--lr", 0.01, "--nc-values", 2, "--limit", 200,
)  # fmt: skip


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("suite") / "out"
    succeed(
        "suite", "heterogeneity", "calibration-rounds", *SMALL, "--sparsity-ratios", 0.5, "--calibration-values", 1, 2,
        "--num-runs", 2, "--out", out,
    )  # fmt: skip
    return out


def test_a_suite_leaves_tables_figures_and_a_report(suite: Path) -> None:
    for name in ("heterogeneity", "calibration-rounds"):
        assert sorted(f.name for f in (suite / name).iterdir()) == [
            "by_bytes.png", "by_round.png", "table.csv", "table.md", "table.tex",
        ]  # fmt: skip
    page = (suite / "report.html").read_text()
    assert "Heterogeneity" in page
    assert "Calibration rounds" in page


def test_the_table_is_the_mean_and_spread_of_the_runs(suite: Path) -> None:
    with (suite / "heterogeneity" / "table.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["sharding"] for row in rows] == ["IID", "Nc = 2"]
    for row, sharding in zip(rows, ("iid", "non_iid"), strict=True):
        found = [
            result["test_score"]
            for result in map(
                json.loads, (f.read_text() for f in suite.glob("works/runs/*/result.json"))
            )
            if (c := result["config"])["sharding"]["sharding"] == sharding
            and c["sparse"]["sparsity_ratio"] == 0
        ]
        assert len(found) == 2
        assert float(row["test accuracy"]) == pytest.approx(sum(found) / 2)
        assert float(row["±"]) == pytest.approx(abs(found[0] - found[1]) / 2**0.5)
        assert row["runs"] == "2"


def test_a_row_that_cannot_run_says_why_and_the_others_go_on(tmp_path: Path) -> None:
    """Krum needs three models and a round has two clients; event files lie under suite and row."""
    pytest.importorskip("tensorboard")
    few = (
        "--num-clients",
        4,
        "--nc-values",
        5,
        "--num-rounds",
        1,
        "--tensorboard",
        "--out",
        tmp_path / "out",
    )
    succeed("suite", "aggregators", *SMALL, *few)
    found = json.loads((tmp_path / "out" / "suite.json").read_text())["suites"]["aggregators"]
    runs = {row["rule"]: row["runs"] for row in found["rows"] if row["sharding"] == "IID"}
    assert (runs["krum"], runs["median"]) == (0, 1)
    assert any(note.startswith("krum, IID, equal: krum: 2 models") for note in found["notes"])
    events = tmp_path / "out" / "metrics" / "aggregators" / "median, IID, equal" / "seed-0"
    assert len(list(events.iterdir())) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("heterogeneity", "--nc-values", 2, 11), "heterogeneity, Nc = 11: non_iid: nc is 11"),
        (("heterogeneity", "--num-clients", 5000), "heterogeneity, IID: num_clients is 5000"),
        (
            ("calibration-rounds", "--calibration-values", 1, 3),
            "3 calibration rounds of 4 fresh clients",
        ),
        (("sparsity", "--mask-file", "mask"), "mask_file is a finished mask"),
        (
            ("heterogeneity", "--aggregator", "krum", "--num-byzantine", 2),
            "needs at least 2f + 3 = 7 models",
        ),
        (("heterogeneity", "--device", "cuda:7"), "cuda:7"),
        (("heterogeneity", "--client", "nowhere:Client"), "nowhere"),
        (("heterogeneity", "--model", "no/such/model"), "no/such/model"),
    ],
    ids=str,
)
def test_what_can_be_told_is_told_before_an_older_suite_is_replaced(
    suite: Path, arguments: tuple[object, ...], message: str
) -> None:
    lines = refused(suite.parent, "suite", *SMALL, *arguments, "--overwrite", "--out", suite)
    assert any(message in line for line in lines), lines


def test_a_suite_none_of_whose_runs_can_be_made_is_an_error(tmp_path: Path) -> None:
    outcome = cli(
        "suite", "heterogeneity", *SMALL, "--head", "no/such/head", "--out", tmp_path / "out"
    )
    assert len(problems_of(outcome)) == 1
    assert "no/such/head" in outcome.err


def test_a_resumed_suite_repeats_no_run_and_gives_the_same_tables(suite: Path) -> None:
    stamps = {f: f.stat().st_mtime_ns for f in suite.glob("works/runs/*/result.json")}
    before = (suite / "heterogeneity" / "table.csv").read_text()
    succeed(
        "suite",
        "heterogeneity",
        *SMALL,
        "--sparsity-ratios",
        0.5,
        "--num-runs",
        2,
        "--resume",
        "--out",
        suite,
    )
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
def test_the_spellings_of_the_course_work_start_a_suite(
    flag: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(
        "deltafl.cli.suite.run_suites",
        lambda names, recipe, training, **rest: asked.append((*names, recipe)) or {},
    )
    given = ("--nc-values", 1, 2, "--j-values", 4, 8, "--sparsity-ratio", 0.8, "--num-rounds", 3)
    call = ("federate", "--model", MODEL, "--data", "digits", flag, *given, "--quiet")
    succeed(*call, "--out", tmp_path / "x")
    ((found, recipe),) = asked
    assert found == name
    assert (recipe.num_rounds, recipe.values.nc_values, recipe.values.j_values) == (
        3,
        (1, 2),
        (4, 8),
    )
    assert recipe.values.sparsity == 0.8


def rows(name: str) -> list[dict[str, object]]:
    """The settings of a suite's rows, which a run can have."""
    recipe = SuiteRecipe.of(model=MODEL, data="digits", num_rounds=40)
    found = [settings for _, settings in SUITES[name](recipe)]
    assert all(recipe.replace(**settings) for settings in found)
    return found


def test_equal_work_for_every_number_of_local_steps() -> None:
    assert {row["local_steps"] * row["num_rounds"] for row in rows("local-steps")} == {160}


def test_the_quick_suite_divides_its_work_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(
        "deltafl.cli.suite.run_suites", lambda names, recipe, *_, **__: asked.append(recipe) or {}
    )
    succeed("suite", "local-steps", "--quick", "--quiet")
    succeed("suite", "local-steps", "--quick", "--j-values", 2, 3, "--quiet")
    quick, given = asked
    assert {quick.num_rounds * quick.values.j_values[0] % j for j in quick.values.j_values} == {0}
    assert given.values.j_values == (2, 3)


def test_every_strategy_and_rule_is_compared() -> None:
    strategies = [row["mask_strategy"] for row in rows("mask-strategies")[1:]]
    assert sorted(strategies) == sorted(MASK_STRATEGIES)
    assert {row["aggregator"] for row in rows("aggregators")} == set(load_rules())
    assert all(map(rows, SUITES))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "name a suite: heterogeneity"),
        (("heterogenity",), 'no suite "heterogenity"; did you mean "heterogeneity"?'),
        (("all", "--quick", "--full"), "give one of them"),
        (("heterogeneity", *SMALL, "--lr", -1), "local.lr: must be greater than 0, not -1"),
        (("heterogeneity", *SMALL, "--num-runs", 0), "num_runs: must be"),
    ],
)
def test_bad_input_is_one_clear_line(
    arguments: tuple[object, ...], message: str, tmp_path: Path
) -> None:
    assert message in "\n".join(refused(tmp_path, "suite", *arguments, "--out", tmp_path / "out"))
