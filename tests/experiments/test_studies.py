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
from deltafl.experiments.study import rows_of
from deltafl.merge.plan import plan_merge
from deltafl.merge.recipe import MergeRecipe
from deltafl.merge.run import run_merge
from deltafl.tasks import ImageInput, load_task
from tiny_models import judged, tiny_clip, vit_file

NAMES = ("training-heterogeneity", "data-heterogeneity", "scaling-coef", "negation", "analogy")
SMALL: tuple[Any, ...] = (
    "--model", vit_file(num_hidden_layers=1), "--tasks", "digits:mirrored",
    "digits:thick", "digits:textured", "--control", "digits", "--domains", "digits:mirrored", "digits:thick",
    "--split", "digits", "--lr-values", 2e-3, 1e-3, "--steps-values", 4, 40, "--draws", 1, "--batch-size", 32,
    "--few-shot", 3, "--methods", "fednova", "median", "krum", "--scaling-coefs", 0.1, 0.3, 1.0, "--val-limit", 60,
    "--test-limit", 80, "--jobs", 1, "--quiet",
)  # fmt: skip


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("studies") / "out"
    succeed("suite", *NAMES, *SMALL, "--num-runs", 2, "--out", out)
    return out


def table(out: Path, name: str) -> list[dict[str, str]]:
    with (out / name / "table.csv").open() as file:
        return list(csv.DictReader(file))


def tables(out: Path) -> dict[str, bytes]:
    return {str(f.relative_to(out)): f.read_bytes() for f in sorted(out.rglob("*.csv"))}


def test_every_study_leaves_tables_and_figures_and_one_report(done: Path) -> None:
    page = (done / "report.html").read_text()
    for name in NAMES:
        assert {f.name for f in (done / name).iterdir()} >= {"table.md", "table.csv", "table.tex"}
        assert list((done / name).glob("*.png"))
        assert name.capitalize().replace("-", " ") in page
    assert "krum" in page


def test_a_merge_in_the_table_is_what_merge_and_evaluate_give(done: Path) -> None:
    """One search of scaling-coef again, by the public pieces: its models, its lambda, its test images."""
    found = json.loads((done / "suite.json").read_text())["studies"]["scaling-coef"]
    row = next(r for r in found["rows"] if r["rule"] == "median")
    accuracies = []
    for seed in (0, 1):
        search = next(
            s for f in (done / "works" / "searches").glob("*/found.json")
            for s in [json.loads(f.read_text())]
            if s["seed"] == seed and s["tasks"] == ["digits_mirrored", "digits_thick", "digits_textured"]
            and all((one["lr"], one["steps"]) == (1e-3, 40) for one in s["asked"])
        )  # fmt: skip
        accuracies.append(rows_of(search)["median"]["mean"])
        told = max(search["rows"][2:], key=lambda r: r["val"])
        folders = [done / "works" / "fine-tunes" / t["model"] for t in search["training"]]
        merged = done.parent / f"merged-{seed}"
        coefficient = told["scaling_coef"]
        recipe = MergeRecipe.of(
            base=str(done / "base"),
            models=list(map(str, folders)),
            method=told["rule"],
            scaling_coef=coefficient,
            **told["params"],
        )
        run_merge(plan_merge(recipe), merged)
        for name, folder in zip(search["tasks"], folders, strict=True):
            head = folder / "head.safetensors"
            whole = judged(merged, name.replace("_", ":"), head=head, seed=seed)
            assert abs(told["test"][name] - whole.score) < 0.15  # 80 of the 200 images
        assert told["mean"] == pytest.approx(sum(told["test"].values()) / 3)
    assert row["accuracy"] == pytest.approx(sum(accuracies) / 2)
    assert row["runs"] == 2


def test_gains_are_differences_on_the_same_models(done: Path) -> None:
    rows = table(done, "training-heterogeneity")
    assert {row["trainings"] for row in rows} == {
        "alike",
        "steps differ",
        "lr differs",
        "both differ",
    }
    for row in rows:
        reference = next(
            r for r in rows if r["trainings"] == row["trainings"] and r["rule"] == "task_arithmetic"
        )
        assert row["merges"] == "2"
        if row["gain, points"]:
            gain = float(row["normalised test"]) - float(reference["normalised test"])
            assert float(row["gain, points"]) == pytest.approx(gain)
            assert float(row["95 % from"]) <= gain <= float(row["to"])
    alike = {r["rule"]: float(r["normalised test"]) for r in rows if r["trainings"] == "alike"}
    assert alike["fednova"] == pytest.approx(alike["task_arithmetic"])  # equal steps: the same rule


def test_subsets_of_every_size_and_parts_of_one_data_set_are_compared(done: Path) -> None:
    cells = {(row["subset"], row["models"]) for row in table(done, "data-heterogeneity")}
    assert cells == {
        ("near", "2"), ("far", "2"), ("all", "3"), ("classes of one data set", "2"), ("classes of one data set", "4"),
    }  # fmt: skip
    near, far = (
        {
            float(r["mean cosine"])
            for r in table(done, "data-heterogeneity")
            if (r["subset"], r["models"]) == (name, "2")
        }
        for name in ("near", "far")
    )
    assert min(near) > max(far)


def test_parts_of_a_data_set_are_trained_on_their_classes_only_and_share_the_head(
    done: Path,
) -> None:
    parts = sorted((done / "works" / "fine-tunes").glob("digits_?of4*-seed0-*"))
    assert len(parts) == 4
    trainings = [json.loads((part / "training.json").read_text()) for part in parts]
    whole = load_task("digits", ImageInput(8, 1, (0.5,), (0.5,)), 0)
    assert sum(t["num_examples"] for t in trainings) == whole.size("train")
    heads = {(part / "head.safetensors").read_bytes() for part in parts}
    assert len(heads) == 1


def test_negation_forgets_the_target_within_the_control(done: Path) -> None:
    found = json.loads((done / "suite.json").read_text())["studies"]["negation"]
    assert found["control"] == "digits"
    assert [row["way"] for row in found["rows"]] == [
        "base",
        "fine-tuned",
        "negated task vector",
        "random vector",
    ]
    by_way = {row["way"]: row for row in found["rows"]}
    for point in (p for p in found["points"] if p["way"] == "fine-tuned" and p["seed"] == 0):
        (folder,) = (done / "works" / "fine-tunes").glob(f"{point['task']}-lr0.001-steps40-seed0-*")
        whole = judged(folder, point["task"].replace("_", ":"))
        assert abs(point["target"] - whole.score) < 0.15  # 80 of the 200 images
    assert by_way["base"]["scaling_coef"] == 0
    assert len(found["points"]) == 2 * 3 * 4
    for point in found["points"]:
        assert point["scaling_coef"] in (0, 0.1, 0.3, 1.0)


def test_a_changed_rule_or_grid_does_not_train_again(done: Path) -> None:
    folder = done / "works" / "fine-tunes"
    before = {f: f.stat().st_mtime_ns for f in folder.rglob("*")}
    changed = [("geometric_median" if a == "median" else 0.7 if a == 0.3 else a) for a in SMALL]
    succeed("suite", "scaling-coef", *changed, "--num-runs", 2, "--resume", "--out", done)
    assert {f: f.stat().st_mtime_ns for f in folder.rglob("*")} == before
    assert "geometric_median" in {row["rule"] for row in table(done, "scaling-coef")}


def test_a_killed_suite_that_goes_on_gives_the_same_tables_with_any_number_of_jobs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("scaling-coef",)
    few = [*SMALL, "--tasks", "digits:mirrored", "digits:thick"]
    few[few.index("--tasks") : few.index("--control")] = []
    arguments = [*map(str, ("suite", *names, *few))]
    monkeypatch.chdir(tmp_path)
    succeed(*arguments, "--out", "whole")
    whole = tables(tmp_path / "whole")
    draw = random.Random(0)
    killed, left_to_kill = 0, draw.randrange(1, 40)
    (tmp_path / "killed").mkdir()
    monkeypatch.chdir(tmp_path / "killed")
    for _ in range(3):
        child = os.fork()
        if not child:
            left = [left_to_kill]
            for function in ("fsync", "replace", "rename", "unlink", "mkdir"):
                setattr(os, function, _counting(getattr(os, function), left))
            outcome = cli(*arguments, "--resume", "--out", "whole")
            print(outcome, file=sys.stderr, flush=True)
            os._exit(0 if outcome.code == 0 else 1)
        status = os.waitpid(child, 0)[1]
        killed += os.WIFSIGNALED(status)
        assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
        left_to_kill = draw.randrange(1, 40)
    assert killed
    jobs = [
        ("2" if a == "1" and arguments[i - 1] == "--jobs" else a) for i, a in enumerate(arguments)
    ]
    succeed(*jobs, "--resume", "--out", "whole")
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
    out = tmp_path / "out"
    wild = [*SMALL, "--scaling-coefs", 1000]
    at = wild.index("--scaling-coefs")
    wild[at : at + 4] = []
    succeed("suite", "scaling-coef", *wild, "--out", out)
    rows = {row["rule"]: row for row in table(out, "scaling-coef")}
    for rule in ("task_arithmetic", "median"):
        assert rows[rule]["normalised test"] == rows["base (unmerged)"]["normalised test"]
        assert float(rows[rule]["λ"]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("scaling-coef", *SMALL, "--methods", "medain"),
            'unknown "medain"; did you mean "median"?',
        ),
        (("scaling-coef", *SMALL, "--tasks", "digits:none"), 'unknown variant of digits "none"'),
        (
            ("scaling-coef", *SMALL, "--search-strategy", "rase"),
            'unknown "rase"',
        ),
        (
            ("scaling-coef", *SMALL, "--few-shot", 3, "--head", "linear"),
            "few_shot is about the ridge head",
        ),
        (("scaling-coef", "--model", "nowhere", "--data", "digits"), "at least two data sets"),
        (("heterogeneity", "scaling-coef", *SMALL), "data is missing"),
    ],
)
def test_bad_input_is_one_clear_line_and_leaves_nothing(
    arguments: tuple[object, ...], message: str, tmp_path: Path
) -> None:
    assert message in "\n".join(refused(tmp_path, "suite", *arguments, "--out", tmp_path / "out"))


def test_other_classes_in_the_second_domain_are_refused_before_anything_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "renamed_domain.py").write_text(
        "from dataclasses import replace\nfrom deltafl.tasks import load_task\n\n\n"
        "def renamed(inputs, seed):\n"
        "    task = load_task('digits', inputs, seed)\n"
        "    return replace(task, class_names=tuple('abcdefghij'))\n"
    )
    monkeypatch.chdir(tmp_path)
    swapped = list(SMALL)
    swapped[swapped.index("--domains") + 2] = "renamed_domain:renamed"
    said = "\n".join(refused(tmp_path, "suite", "analogy", *swapped, "--out", tmp_path / "out"))
    assert "analogy: digits:mirrored and renamed_domain:renamed have other classes" in said


def test_another_model_is_refused_on_resume(done: Path) -> None:
    other = [
        vit_file(num_hidden_layers=1, hidden_size=8, intermediate_size=32) if a == SMALL[1] else a
        for a in SMALL
    ]
    outcome = cli("suite", "scaling-coef", *other, "--resume", "--out", done)
    assert outcome.code == 2
    assert "is another model than" in outcome.err


def test_two_data_sets_of_one_name_are_refused_before_anything_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "two_of_a_name.py").write_text(
        "from deltafl.tasks import load_task\n\n\n"
        "def one(inputs, seed):\n"
        "    return load_task('digits', inputs, seed)\n\n\nother = one\n"
    )
    monkeypatch.chdir(tmp_path)
    doubled = [
        {"digits:thick": "two_of_a_name:one", "digits:textured": "two_of_a_name:other"}.get(a, a)
        for a in SMALL
    ]
    said = refused(tmp_path, "suite", "scaling-coef", *doubled, "--out", tmp_path / "out")
    assert said == ['--tasks: two_of_a_name:one, two_of_a_name:other are all called "digits"']


def test_zero_shot_heads_come_from_the_text_tower_of_the_model_that_was_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DELTAFL_CACHE", str(tmp_path / "cache"))
    tiny_clip(tmp_path / "clip")
    outcome = succeed(
        "suite", "scaling-coef", "--model", tmp_path / "clip", "--head", "zero-shot", "--tasks", "digits:mirrored",
        "digits:thick", "--lr-values", 1e-3, "--steps-values", 2, "--methods", "median", "--scaling-coefs", 0.3,
        "--val-limit", 30, "--test-limit", 60, "--limit", 80, "--batch-size", 8, "--jobs", 1, "--out", tmp_path / "out",
    )  # fmt: skip
    assert "median" in outcome.out
    trained = [
        json.loads(f.read_text()) for f in tmp_path.glob("out/works/fine-tunes/*/training.json")
    ]
    assert [t["num_examples"] for t in trained] == [80, 80]


def test_a_dot_in_a_task_s_name_does_not_mix_up_heads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "dotted_task.py").write_text(
        "from dataclasses import replace\nfrom deltafl.tasks import load_task\n\n\n"
        "def dotted(inputs, seed):\n"
        "    return replace(load_task('digits', inputs, seed), name='v1.5')\n"
    )
    monkeypatch.chdir(tmp_path)
    dotted = ["dotted_task:dotted" if a == "digits:textured" else a for a in SMALL]
    succeed("suite", "scaling-coef", *dotted, "--num-runs", 2, "--out", "out")
    assert len(list((tmp_path / "out" / "works" / "heads").glob("v1.5-*/head.safetensors"))) == 2


def test_the_base_folder_holds_the_model_that_was_named(done: Path) -> None:
    tensors = open_tensors(done / "base")
    assert all(torch.isfinite(tensors[name]).all() for name in tensors)
