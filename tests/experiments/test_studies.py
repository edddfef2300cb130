"""`deltafl suite` with one-shot studies, from the outside, on a tiny ViT and the digits."""

import csv
import json
import os
import random
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoint_files import cli, refused, succeed
from deltafl.checkpoints.checkpoint import open_tensors
from deltafl.experiments import STUDIES as ALL
from deltafl.experiments.merges import told
from deltafl.merge.plan import plan_merge
from deltafl.merge.recipe import MergeRecipe
from deltafl.merge.run import run_merge
from deltafl.tasks import ImageInput, load_task
from tiny_models import judged, tiny_clip, vit_file

STUDIES = [name for name in ALL if name != "language"]

MODEL = vit_file(num_hidden_layers=1)
PLUG_INS = """
from dataclasses import replace
from deltafl.tasks import load_task

def one(inputs, seed):
    return load_task("digits", inputs, seed)

def renamed(inputs, seed):
    return replace(one(inputs, seed), class_names=tuple("abcdefghij"))

def dotted(inputs, seed):
    return replace(one(inputs, seed), name="v1.5")

other = one
"""
"""Tasks of a user's own; the module's name is one that no other test imports."""


def small(*names: str, **changes: Any) -> list[str]:
    """The arguments of a small suite."""
    settings: dict[str, Any] = {
        "model": MODEL, "tasks": ["digits:mirrored", "digits:thick", "digits:textured"],
        "control": "digits", "domains": ["digits:mirrored", "digits:thick"], "split": "digits:thick",
        "lr-values": [2e-3, 1e-3], "steps-values": [4, 40], "draws": 1, "batch-size": 32, "few-shot": 3,
        "examples-values": [8, 32], "rival-steps": 4,
        "methods": ["fednova", "median", "krum"], "scaling-coefs": [0.1, 0.3, 1.0], "val-limit": 60,
        "test-limit": 80, "jobs": 1,
    }  # fmt: skip
    told = {key.replace("_", "-"): value for key, value in changes.items()}
    flags = {
        f"--{k}": v if isinstance(v, list) else [v] for k, v in (settings | told).items() if v != []
    }
    return [*names, "--quiet", *(str(a) for flag, values in flags.items() for a in (flag, *values))]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("studies") / "out"
    succeed("suite", *small(*STUDIES, num_runs=2), "--out", out)
    return out


@pytest.fixture
def plug_ins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "study_tasks.py").write_text(PLUG_INS)
    monkeypatch.chdir(tmp_path)


def table(out: Path, name: str) -> list[dict[str, str]]:
    with (out / name / "table.csv").open() as file:
        return list(csv.DictReader(file))


def tables(out: Path) -> dict[str, bytes]:
    return {str(f.relative_to(out)): f.read_bytes() for f in sorted(out.rglob("*.csv"))}


def study(out: Path, name: str) -> dict[str, Any]:
    return json.loads((out / "suite.json").read_text())["studies"][name]


def test_every_study_leaves_tables_and_figures_and_one_report(done: Path) -> None:
    page = (done / "report.html").read_text()
    for name in STUDIES:
        assert {f.name for f in (done / name).iterdir()} >= {"table.md", "table.csv", "table.tex"}
        assert list((done / name).glob("*.png"))
        assert name.capitalize().replace("-", " ") in page
    assert "krum: " in page  # left out, and why
    tensors = open_tensors(done / "base")
    assert all(torch.isfinite(tensors[name]).all() for name in tensors)


def test_a_merge_in_the_table_is_what_merge_and_evaluate_give(done: Path) -> None:
    """The searches of scaling-coef again, by the public pieces: models, lambda, test images."""
    row = next(r for r in study(done, "scaling-coef")["rows"] if r["rule"] == "median")
    files = (done / "works" / "searches").glob("*/found.json")
    wanted = [("digits_mirrored", "digits_thick", "digits_textured"), {(1e-3, 40)}]
    accuracies: dict[int, float] = {}
    for found in map(json.loads, (f.read_text() for f in files)):
        trainings = {(t["lr"], t["num_steps"]) for t in found["training"]}
        folders = [done / "works" / "fine-tunes" / t["model"] for t in found["training"]]
        seed = json.loads((folders[0] / "training.json").read_text())["seed"]
        median = [r["mean"] for r in told(found["rows"]) if r["rule"] == "median"]
        if [tuple(found["tasks"]), trainings] != wanted or seed in accuracies or not median:
            continue
        accuracies[seed] = median[0]
        best = max(found["rows"][2:], key=lambda r: r["val"])
        recipe = MergeRecipe.of(
            base=str(done / "base"), models=list(map(str, folders)), method=best["rule"],
            scaling_coef=best["scaling_coef"], **best["params"],
        )  # fmt: skip
        merged = done.parent / f"merged-{seed}"
        run_merge(plan_merge(recipe), merged)
        for name, folder in zip(found["tasks"], folders, strict=True):
            head = folder / "head.safetensors"
            whole = judged(merged, name.replace("_", ":"), head=head, seed=seed)
            assert abs(best["test"][name] - whole.score) < 0.15  # 80 of the 200 images
        assert best["mean"] == pytest.approx(sum(best["test"].values()) / 3)
    assert accuracies.keys() == {0, 1}
    assert row["accuracy"] == pytest.approx(sum(accuracies.values()) / 2)
    assert row["runs"] == 2


def test_merges_by_examples_stand_beside_training_on_the_same(done: Path) -> None:
    rows = {(r["rule"], r["examples"]): r for r in study(done, "examples")["rows"]}
    trained = {(way, n) for way in ("distillation", "training on labels") for n in (8, 32)}
    merged = {(rule, n) for rule in ("sequential_regression", "regmean") for n in (8, 32)}
    others = {("average", ""), ("fednova", ""), ("training on labels", "all")}
    assert trained | merged | others <= rows.keys()
    assert {rule for rule, n in rows if n == ""} & {"fisher", "learned", "distillation"} == set()
    reference = rows["task_arithmetic", ""]
    assert reference["gain"] is None or reference["gain"] != reference["gain"]
    for row in rows.values():
        assert row["runs"] == 2
        assert row["worst"] <= row["accuracy"]
        if row is not reference:
            assert row["gain"] == pytest.approx(row["mean"] - reference["mean"])


def test_gains_are_differences_on_the_same_models(done: Path) -> None:
    rows = table(done, "training-heterogeneity")
    kinds = {"alike", "steps differ", "lr differs", "both differ"}
    assert {row["trainings"] for row in rows} == kinds
    means = {(row["trainings"], row["rule"]): float(row["normalised test"]) for row in rows}
    for row in rows:
        assert row["merges"] == "2"
        if row["gain, points"]:
            gain = float(row["normalised test"]) - means[row["trainings"], "task_arithmetic"]
            assert float(row["gain, points"]) == pytest.approx(gain)
            assert float(row["95 % from"]) <= gain <= float(row["to"])
    # equal steps: the same rule
    assert means["alike", "fednova"] == pytest.approx(means["alike", "task_arithmetic"])


def test_subsets_of_every_size_and_parts_of_one_data_set_are_compared(done: Path) -> None:
    rows = table(done, "data-heterogeneity")
    cells = {(r["subset"], r["models"]): float(r["mean cosine"]) for r in rows}
    parts = "classes of one data set"
    assert cells.keys() == {("near", "2"), ("far", "2"), ("all", "3"), (parts, "2"), (parts, "4")}
    assert cells["near", "2"] > cells["far", "2"]


def test_parts_of_a_data_set_are_trained_on_their_classes_only_and_share_the_head(
    done: Path,
) -> None:
    parts = sorted((done / "works" / "fine-tunes").glob("digits_thick_?of4*-seed0-*"))
    assert len(parts) == 4
    trainings = [json.loads((part / "training.json").read_text()) for part in parts]
    whole = load_task("digits:thick", ImageInput(8, 1, (0.5,), (0.5,)), 0)
    assert sum(t["num_examples"] for t in trainings) == whole.size("train")
    assert len({(part / "head.safetensors").read_bytes() for part in parts}) == 1


def test_models_that_differ_in_their_head_only_are_two(done: Path) -> None:
    """A half of the classes has its own data set's head, and in an analogy that of the first domain."""
    halves = (done / "works" / "fine-tunes").glob("digits_thick_1of2*-seed0-*")
    heads = [
        (done / "works" / "fine-tunes").glob(f"digits_{name}-*-seed0-*")
        for name in ("thick", "mirrored")
    ]
    expected = {(next(folders) / "head.safetensors").read_bytes() for folders in heads}
    assert {(half / "head.safetensors").read_bytes() for half in halves} == expected
    assert len(expected) == 2


def test_negation_forgets_the_target_within_the_control(done: Path) -> None:
    found = study(done, "negation")
    ways = ["base", "fine-tuned", "negated task vector", "random vector"]
    assert found["control"] == "digits"
    assert [row["way"] for row in found["rows"]] == ways
    assert found["rows"][0]["scaling_coef"] == 0
    assert len(found["points"]) == 2 * 3 * 4
    assert {point["scaling_coef"] for point in found["points"]} <= {0, 0.1, 0.3, 1.0}
    for point in (p for p in found["points"] if p["way"] == "fine-tuned" and p["seed"] == 0):
        (folder,) = (done / "works" / "fine-tunes").glob(f"{point['task']}-lr0.001-steps40-seed0-*")
        whole = judged(folder, point["task"].replace("_", ":"))
        assert abs(point["target"] - whole.score) < 0.15  # 80 of the 200 images


def test_a_changed_rule_or_grid_does_not_train_again(done: Path) -> None:
    folder = done / "works" / "fine-tunes"
    before = {f: f.stat().st_mtime_ns for f in folder.rglob("*")}
    changed = {"methods": ["fednova", "geometric_median"], "scaling_coefs": [0.1, 0.7, 1.0]}
    succeed("suite", *small("scaling-coef", num_runs=2, **changed), "--resume", "--out", done)
    assert {f: f.stat().st_mtime_ns for f in folder.rglob("*")} == before
    assert "geometric_median" in {row["rule"] for row in table(done, "scaling-coef")}


def test_a_killed_suite_that_goes_on_gives_the_same_tables_with_any_number_of_jobs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = {"tasks": ["digits:mirrored", "digits:thick"]}
    arguments = ["suite", *small("scaling-coef", **few), "--out", "whole"]
    monkeypatch.chdir(tmp_path)
    succeed(*arguments)
    whole = tables(tmp_path / "whole")
    draw, killed = random.Random(0), 0
    (tmp_path / "killed").mkdir()
    monkeypatch.chdir(tmp_path / "killed")
    for _ in range(3):
        left = [draw.randrange(1, 40)]
        child = os.fork()
        if not child:
            for function in ("fsync", "replace", "rename", "unlink", "mkdir"):
                setattr(os, function, _counting(getattr(os, function), left))
            outcome = cli(*arguments, "--resume")
            print(outcome, file=sys.stderr, flush=True)
            os._exit(0 if outcome.code == 0 else 1)
        status = os.waitpid(child, 0)[1]
        killed += os.WIFSIGNALED(status)
        assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    assert killed
    succeed("suite", *small("scaling-coef", **few, jobs=2), "--resume", "--out", "whole")
    assert tables(tmp_path / "killed" / "whole") == whole


def _counting(original: Any, left: list[int]) -> Any:
    def call(*arguments: Any, **options: Any) -> Any:
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments, **options)

    return call


def test_the_base_is_one_of_the_candidates(tmp_path: Path) -> None:
    """Deltas that destroy the model: every rule stays with the base."""
    succeed("suite", *small("scaling-coef", scaling_coefs=1000), "--out", tmp_path / "out")
    rows = {row["rule"]: row for row in table(tmp_path / "out", "scaling-coef")}
    for rule in ("task_arithmetic", "median"):
        assert rows[rule]["normalised test"] == rows["base (unmerged)"]["normalised test"]
        assert float(rows[rule]["λ"]) == 0


@pytest.mark.usefixtures("plug_ins")
@pytest.mark.parametrize(
    ("names", "changes", "message"),
    [
        (["scaling-coef"], {"methods": "medain"}, 'unknown "medain"; did you mean "median"?'),
        (["scaling-coef"], {"tasks": ["digits", "digits:none"]}, 'unknown variant of digits "none"'),
        (["scaling-coef"], {"search_strategy": "rase"}, 'unknown "rase"'),
        (["scaling-coef"], {"head": "linear"}, "few_shot is about the ridge head"),
        (["scaling-coef"], {"tasks": []}, "at least two data sets"),
        (["heterogeneity", "scaling-coef"], {}, "data is missing"),
        (["negation"], {"tasks": ["digits", "digits"]}, "names a data set twice"),
        (
            ["analogy"],
            {"domains": ["digits:mirrored", "study_tasks:renamed"]},
            "analogy: digits:mirrored and study_tasks:renamed have other classes",
        ),
        (
            ["scaling-coef"],
            {"tasks": ["digits:thick", "study_tasks:one", "study_tasks:other"]},
            '--tasks: study_tasks:one, study_tasks:other are all called "digits"',
        ),
    ],
)  # fmt: skip
def test_bad_input_is_one_clear_line_and_leaves_nothing(
    names: list[str], changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    said = refused(tmp_path, "suite", *small(*names, **changes), "--out", tmp_path / "out")
    assert message in "\n".join(said)


def test_another_model_is_refused_on_resume(done: Path) -> None:
    other = vit_file(num_hidden_layers=1, hidden_size=8, intermediate_size=32)
    outcome = cli("suite", *small("scaling-coef", model=other), "--resume", "--out", done)
    assert outcome.code == 2
    assert "is another model than" in outcome.err


def test_zero_shot_heads_come_from_the_text_tower_of_the_model_that_was_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DELTAFL_CACHE", str(tmp_path / "cache"))
    tiny_clip(tmp_path / "clip")
    changes = {
        "model": tmp_path / "clip", "head": "zero-shot", "few_shot": [], "control": [], "domains": [], "split": [],
        "tasks": ["digits:mirrored", "digits:thick"], "lr_values": 1e-3, "steps_values": 2, "methods": "median",
        "scaling_coefs": 0.3, "val_limit": 30, "test_limit": 60, "limit": 80, "batch_size": 8,
    }  # fmt: skip
    succeed("suite", *small("scaling-coef", **changes), "--out", tmp_path / "out")
    assert "median" in {row["rule"] for row in table(tmp_path / "out", "scaling-coef")}
    files = tmp_path.glob("out/works/fine-tunes/*/training.json")
    assert [json.loads(f.read_text())["num_examples"] for f in files] == [80, 80]


@pytest.mark.usefixtures("plug_ins")
def test_a_dot_in_a_task_s_name_does_not_mix_up_heads() -> None:
    tasks = ["digits:mirrored", "digits:thick", "study_tasks:dotted"]
    succeed("suite", *small("scaling-coef", tasks=tasks, num_runs=2), "--out", "out")
    assert len(list(Path("out/works/heads").glob("v1.5-*/head.safetensors"))) == 2
