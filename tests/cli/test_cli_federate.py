"""`deltafl federate` from the outside."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from checkpoint_files import refusal, refused, succeed
from deltafl.federated.recipe import FederatedRecipe
from deltafl.recipes import read_recipe
from deltafl.training.record import read_rows
from tiny_models import vit_file

ROOT = Path(__file__).parents[2]
MODEL = vit_file(num_hidden_layers=1)
SMALL = (
    "--model", MODEL, "--data", "digits", "--num-clients", 6, "--participation-rate", 0.5, "--num-rounds", 3,
    "--local-steps", 2, "--batch-size", 16, "--lr", 0.01,
)  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("federate") / "run"
    succeed(
        "federate", *SMALL, "--sparsity-ratio", 0.5, "--aggregator", "fedgma", "--rho", 0.6, "--calibration-rounds", 2,
        "--save-client-updates", 1, "--out", out,
    )  # fmt: skip
    return out


def test_a_run_leaves_everything_that_is_promised(run: Path) -> None:
    assert sorted(f.name for f in run.iterdir()) == [
        "config.yaml", "figure.png", "mask.safetensors", "model", "record.jsonl", "report.html", "result.json",
        "updates",
    ]  # fmt: skip
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert (config["server"]["aggregator"], config["server"]["rho"]) == ("fedgma", 0.6)
    rows = read_rows(run / "record.jsonl")
    assert [(r["event"], r["round"]) for r in rows] == [
        ("start", 0),
        ("round", 1),
        ("round", 2),
        ("round", 3),
    ]
    for row in rows[1:]:
        assert row["bytes_up"] == 3 * 4 * rows[0]["kept"]
        assert row["client_seconds"] > 0
        assert row["server_seconds"] > 0
        assert row["peak_memory_bytes"] > 1e6
        assert len(row["clients"]) == 3
        assert row["failed"] == []
    assert len(list((run / "updates" / "round-0001").glob("client-*"))) == 3


def test_the_best_model_scores_what_the_result_says(run: Path, tmp_path: Path) -> None:
    result = json.loads((run / "result.json").read_text())
    for split, key in (("test", "test_score"), ("val", "val_score")):
        succeed(
            "evaluate",
            "--models",
            run / "model",
            "--data",
            "digits",
            "--split",
            split,
            "--json",
            tmp_path / "x.json",
        )
        (scores,) = json.loads((tmp_path / "x.json").read_text())["results"]
        assert scores["score"] == pytest.approx(result[key], abs=1e-9)
    accuracies = [r["val_score"] for r in read_rows(run / "record.jsonl")]
    assert result["val_score"] == max(accuracies)
    assert result["best_round"] == accuracies.index(max(accuracies))


def test_the_report_shows_the_result(run: Path) -> None:
    page = (run / "report.html").read_text()
    result = json.loads((run / "result.json").read_text())
    assert f"{100 * result['test_score']:.1f}%" in page
    assert "MB sent by clients" in page
    assert "No update was left out." in page
    assert (run / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_inspect_reads_the_saved_updates(run: Path) -> None:
    clients = sorted((run / "updates" / "round-0001").glob("client-*"))
    said = succeed(
        "inspect", "--base", run / "updates" / "round-0001" / "base", "--models", *clients
    ).out
    assert clients[0].name in said


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--sharding", "non_iid"), "sharding non_iid needs nc"),
        (("--sharding", "non_iid", "--nc", 11), "11"),
        (("--sharding", "iidd"), 'sharding: unknown "iidd"; did you mean "iid"?'),
        (("--num-clients", 5000), "5000"),
        (("--participation-rate", 0.01), "selects no client"),
        (("--sparsity-ratio", 1.0), "sparsity_ratio: must be less than 1, not 1.0"),
        (("--sparsity-ratio", 0.5, "--mask-strategy", "least"), 'mask_strategy: unknown "least"'),
        (("--aggregator", "fedgma"), "rho"),
        (("--aggregator", "fedagv"), 'did you mean "fedavg"?'),
        (("--local-algorithm", "scaffold"), "scaffold"),
        (("--mask-file", "no/such/mask"), "no/such/mask"),
        (("--device", "cuda:7"), "cuda:7"),
        (("--client", "nowhere:Client"), "nowhere"),
        (("--save-client-updates", 9), "save_client_updates: 9; name rounds from 1 to 3"),
        (("--calibration-rounds", 5, "--sparsity-ratio", 0.5), "fresh clients"),
        (("--aggregator", "krum", "--num-byzantine", 1), "needs at least 2f + 3 = 5 models"),
        (("--num-client", 3), "--num-client"),
    ],
)
def test_bad_input_is_one_clear_line_and_leaves_nothing(
    tmp_path: Path, options: tuple[Any, ...], message: str
) -> None:
    assert message in "\n".join(
        refused(tmp_path, "federate", *SMALL, *options, "--out", tmp_path / "run")
    )


def test_an_existing_run_is_refused_and_resumed_only_as_it_was(run: Path) -> None:
    assert "exists" in refusal(run, "federate", *SMALL, "--out", run)
    lines = refused(run, "federate", *SMALL, "--lr", 0.02, "--resume", "--out", run)
    assert any("lr = 0.01, now it is 0.02" in line for line in lines)


def test_the_bundled_configurations_are_recipes_without_a_problem() -> None:
    for name in ("default.yaml", "realdata-quick.yaml"):
        assert read_recipe(FederatedRecipe, ROOT / "configs" / name)


@pytest.mark.parametrize(
    "command", [("federate",), ("federate", "--compare-strategies"), ("suite", "heterogeneity")]
)
def test_without_tensorboard_the_flag_is_refused_before_anything_runs(
    command: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    said = refusal(tmp_path, *command, *SMALL, "--tensorboard", "--out", tmp_path / "run")
    assert 'pip install "deltafl[tensorboard]"' in said


@pytest.mark.realdata
@pytest.mark.parametrize("extra", [(), ("--sparsity-ratio", 0.9)])
def test_four_rounds_on_real_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, realdata: Path, extra: tuple[Any, ...]
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("DELTAFL_CACHE", str(tmp_path / "cache"))
    out = tmp_path / "run"
    succeed(
        "federate", "--config", "configs/realdata-quick.yaml", "--limit", 2000, "--out", out, *extra
    )
    result = json.loads((out / "result.json").read_text())
    assert (
        result["test_score"] > 0.15
    )  # 100 classes; the ridge head alone has about 0.25 from 2,000 images
    assert result["failed_updates"] == 0
