"""`deltafl federate` from the outside."""

import json
import sys
from pathlib import Path

import pytest
import yaml

from checkpoint_files import refusal, refused, succeed
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
    options = "--sparsity-ratio 0.5 --aggregator fedgma --rho 0.6 --calibration-rounds 2"
    succeed("federate", *SMALL, *options.split(), "--save-client-updates", 1, "--out", out)
    return out


def test_a_run_leaves_everything_that_is_promised(run: Path):
    files = (
        "config.yaml figure.png mask.safetensors model record.jsonl report.html result.json updates"
    )
    assert sorted(f.name for f in run.iterdir()) == files.split()
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert (config["server"]["aggregator"], config["server"]["rho"]) == ("fedgma", 0.6)
    start, *rows = read_rows(run / "record.jsonl")
    assert [(r["event"], r["round"]) for r in rows] == [("round", n) for n in (1, 2, 3)]
    for row in rows:
        assert row["bytes_up"] == 3 * 4 * start["kept"]
        assert row["client_seconds"] > 0
        assert row["server_seconds"] > 0
        assert row["peak_memory_bytes"] > 1e6
        assert (len(row["clients"]), row["failed"]) == (3, [])
    clients = sorted((run / "updates" / "round-0001").glob("client-*"))
    assert len(clients) == 3
    base = ("--base", run / "updates" / "round-0001" / "base")
    assert clients[0].name in succeed("inspect", *base, "--models", *clients).out
    page, result = (run / "report.html").read_text(), json.loads((run / "result.json").read_text())
    shown = (f"{100 * result['test_score']:.1f}%", "MB sent by clients", "No update was left out.")
    assert all(part in page for part in shown)
    assert (run / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_the_best_model_scores_what_the_result_says(run: Path, tmp_path: Path):
    result = json.loads((run / "result.json").read_text())
    for split in ("test", "val"):
        judge = ("evaluate", "--models", run / "model", "--data", "digits", "--split", split)
        succeed(*judge, "--json", tmp_path / "x.json")
        (scores,) = json.loads((tmp_path / "x.json").read_text())["results"]
        assert scores["score"] == pytest.approx(result[f"{split}_score"], abs=1e-9)
    accuracies = [r["val_score"] for r in read_rows(run / "record.jsonl")]
    assert result["val_score"] == max(accuracies)
    assert result["best_round"] == accuracies.index(max(accuracies))


MISTAKES = {
    "--sharding non_iid --nc 11": "11",
    "--num-clients 5000": "5000",
    "--participation-rate 0.01": "selects no client",
    "--aggregator fedgma": "rho",
    "--mask-file no/such/mask": "no/such/mask",
    "--device cuda:7": "cuda:7",
    "--client nowhere:Client": "nowhere",
    "--aggregator krum --num-byzantine 1": "needs at least 2f + 3 = 5 models",
    "--num-client 3": "--num-client",
}


@pytest.mark.parametrize(("options", "told"), MISTAKES.items(), ids=str)
@pytest.mark.parametrize("dry", [(), ("--dry-run",)])
def test_bad_input_is_one_clear_line_and_leaves_nothing(tmp_path: Path, options, told, dry):
    more = (*options.split(), *dry, "--out", tmp_path / "run")
    assert told in refusal(tmp_path, "federate", *SMALL, *more)


def test_a_run_is_resumed_only_as_it_was(run: Path):
    lines = refused(run, "federate", *SMALL, "--lr", 0.02, "--resume", "--out", run)
    assert any("lr = 0.01, now it is 0.02" in line for line in lines)


@pytest.mark.parametrize(
    "command", ["federate", "federate --compare-strategies", "suite heterogeneity"]
)
def test_without_tensorboard_the_flag_is_refused_before_anything_runs(
    command, tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    said = refusal(tmp_path, *command.split(), *SMALL, "--tensorboard", "--out", tmp_path / "run")
    assert 'pip install "deltafl[tensorboard]"' in said


@pytest.mark.realdata
@pytest.mark.parametrize("extra", [(), ("--sparsity-ratio", 0.9)])
def test_four_rounds_on_real_images(tmp_path: Path, monkeypatch, realdata: Path, extra):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("DELTAFL_CACHE", str(tmp_path / "cache"))
    out = tmp_path / "run"
    config = ("--config", "configs/realdata-quick.yaml", "--limit", 2000)
    succeed("federate", *config, "--out", out, *extra)
    result = json.loads((out / "result.json").read_text())
    # 100 classes; the ridge head alone has about 0.25 from 2,000 images
    assert result["test_score"] > 0.15
    assert result["failed_updates"] == 0
