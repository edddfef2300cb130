"""The study of language models, whole, on a tiny Llama and questions that it can learn."""

import json
from pathlib import Path

import pytest

from checkpoint_files import cli, succeed
from deltafl.models import load_net
from deltafl.tasks import DataRecipe, load_task
from deltafl.training import evaluate
from tiny_models import tiny_llama


def questions(folder: Path) -> None:
    """Two data sets of questions with a number for an answer."""
    folder.mkdir()
    for name, text in (("sums", "{} and 1?"), ("days", "day {}?")):
        for split, count in (("train", 60), ("test", 12)):
            rows = [
                {"prompt": text.format(i % 9), "response": f"#### {i % 9}"} for i in range(count)
            ]
            lines = "\n".join(map(json.dumps, rows))
            (folder / f"{name}_{split}.jsonl").write_text(lines)


def test_likelihood_chooses_and_what_models_write_is_told_beside_it(tmp_path: Path):
    tiny_llama(tmp_path / "base").save(tmp_path / "base")
    questions(tmp_path / "data")
    config = tmp_path / "study.yaml"
    written = {"sums": "exact"}
    study = {
        "tasks": ["sums", "days"], "lr_values": [0.01], "steps_values": [40], "scaling_coefs": [0.3, 0.6],
        "methods": ["ties", "regmean"], "examples_values": [4], "written": written, "written_limit": 6, "jobs": 1,
    }  # fmt: skip
    data = {"data": "", "data_dir": str(tmp_path / "data"), "max_new_tokens": 8}
    config.write_text(json.dumps({"model": str(tmp_path / "base"), "data": data, "study": study}))
    out = tmp_path / "out"
    said = succeed(
        "suite", "language", "--config", config, "--batch-size", 12, "--out", out, "--device", "cpu"
    ).out
    told = json.loads((out / "suite.json").read_text())["studies"]["language"]
    rows = {row["rule"]: row for row in told["rows"]}
    assert [*rows] == [
        "single-task models",
        "base (unmerged)",
        "task_arithmetic",
        "ties",
        "regmean",
        "average",
    ]
    assert rows["single-task models"]["mean"] == 1
    assert rows["base (unmerged)"]["mean"] == 0
    assert 0 < rows["task_arithmetic"]["mean"] < 1.5
    assert "sums, exact match" in said

    def judged(model: Path, name: str) -> float:
        net = load_net(model)
        task = load_task(DataRecipe.of(data=name, data_dir=data["data_dir"]), net.inputs, 0)
        return evaluate(net, task, device="cpu").score

    tuned = {n: next((out / "works/fine-tunes").glob(f"{n}-*")) for n in ("sums", "days")}
    single, base = rows["single-task models"], rows["base (unmerged)"]
    mean = tmp_path / "mean"
    succeed("merge", "--base", out / "base", "--models", *tuned.values(), "--out", mean)
    gained = []
    for name, folder in tuned.items():
        assert single[name] == pytest.approx(judged(folder, name), abs=1e-6)
        gained.append((judged(mean, name) - base[name]) / (single[name] - base[name]))
    assert rows["average"]["mean"] == pytest.approx(sum(gained) / 2, abs=1e-3)
    assert 0 <= rows["base (unmerged)"]["sums, exact match"] <= single["sums, exact match"] <= 1


def test_what_is_to_be_written_is_looked_at_before_anything_trains(tmp_path: Path):
    tiny_llama(tmp_path / "base").save(tmp_path / "base")
    questions(tmp_path / "data")
    given = {
        "model": str(tmp_path / "base"),
        "data": {"data": "", "data_dir": str(tmp_path / "data")},
    }
    for written, why in (
        ({"sums": "exat"}, "study.written.sums"),
        ({"hours": "exact"}, 'no folder "'),
        ({"sums": "pass@1"}, "--allow-code-execution"),
    ):
        study = {"tasks": ["sums", "days"], "written": written}
        (tmp_path / "study.yaml").write_text(json.dumps(given | {"study": study}))
        refused = cli(
            "suite", "language", "--config", tmp_path / "study.yaml", "--out", tmp_path / "out"
        )
        assert refused.code == 2
        assert why in refused.err, refused.err
        assert not (tmp_path / "out").exists()
