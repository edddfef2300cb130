"""`deltafl search` from the outside."""

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open

from checkpoint_files import files_in, refusal, succeed
from deltafl.checkpoints import hub
from deltafl.merge.search_recipe import SearchRecipe
from deltafl.models.fit import random_head
from deltafl.models.head import HEAD_FILE, save_head
from deltafl.training.record import read_rows
from merge.test_search_run import VARIANTS, language_recipe, train_digits, tune_on_lines


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_digits(tmp_path_factory)


def recipe(trained: Path, tmp_path: Path, **changes: Any) -> Path:
    """A recipe over the fine-tunes of `trained`, with a grid that takes no time."""
    held = {
        "base": str(trained / "base"),
        "models": [entry(trained, v) for v in VARIANTS],
        "methods": ["task_arithmetic", {"method": "fedgma", "rho": [0.4, 1.0]}],
        "scaling_coefs": [0.3, 0.8],
        "threads": 1,
    }
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(held | changes, sort_keys=False))
    return file


def entry(trained: Path, variant: str = VARIANTS[0], **changes: Any) -> dict[str, Any]:
    return {"path": str(trained / variant), "data": f"digits:{variant}"} | changes


def score(model: Path, data: object, tmp_path: Path, *options: object) -> float:
    """What `deltafl evaluate` says of a model."""
    file = tmp_path / "scores.json"
    succeed("evaluate", "--models", model, "--data", data, "--json", file, *options)
    (found,) = json.loads(file.read_text())["results"]
    return found["score"]


def result_of(out: Path) -> dict[str, Any]:
    return json.loads((out / "result.json").read_text())


def test_the_output_holds_everything_and_the_winner_scores_what_its_row_says(trained, tmp_path):
    out = tmp_path / "out"
    said = succeed("search", recipe(trained, tmp_path), "--out", out).out
    files = "config.yaml merged record.jsonl report.html result.json scores.safetensors table.csv table.md table.tex"
    assert sorted(f.name for f in out.iterdir()) == files.split()
    result, rows = result_of(out), read_rows(out / "record.jsonl")
    assert [r["event"] for r in rows] == ["candidate"] * (1 + 2 * (1 + 2)) + ["test"] * 4
    candidates, best = result["candidates"], result["best"]
    assert [r["value"] for r in rows[:-4]] == [c["value"] for c in candidates]
    with safe_open(out / "scores.safetensors", "pt") as scores:
        labels = json.loads(scores.metadata()["candidates"])
        means = {t: scores.get_tensor(t).double().mean(1).tolist() for t in result["tasks"]}
    evaluated = [c for c in candidates if c["same_as"] is None]
    for i, (label, c) in enumerate(zip(labels, evaluated, strict=True)):
        assert label.startswith(c["method"])
        assert {task: means[task][i] for task in means} == c["val"]
    assert best["value"] == max(c["value"] for c in candidates)
    for task, variant in zip(result["tasks"], VARIANTS, strict=True):
        options = ("--split", "val", "--head", trained / "base" / HEAD_FILE)
        found = score(out / "merged", f"digits:{variant}", tmp_path, *options)
        assert found == best["val"][task]
    with (out / "table.csv").open() as file:
        assert [line[0] for line in csv.reader(file)][1:] == [r["rule"] for r in result["rows"]]
    for row in result["rows"]:
        for name, text in (("md", r"\_"), ("tex", r"\_")):
            assert row["rule"].replace("_", text) in (out / f"table.{name}").read_text()
        assert row["rule"] in (out / "report.html").read_text()
        assert row["rule"] in said
        assert f"{100 * row['mean']:.1f}" in said
    card = (out / "merged/README.md").read_text()
    assert f"| | {' | '.join(result['tasks'])} | mean |" in card
    for row in result["rows"]:
        scores = " | ".join(f"{value:.4g}" for value in (*row["test"].values(), row["mean"]))
        assert f"| {row['rule']} | {scores} |\n" in card + "\n"
    assert f"merged model: {out / 'merged'}\nreport: {out / 'report.html'}" in said
    assert yaml.safe_load((out / "config.yaml").read_text())["scaling_coefs"] == [0.3, 0.8]


def test_where_the_base_is_best_no_merged_model_is_written_and_the_command_says_so(
    trained, tmp_path
):
    out = tmp_path / "out"
    file = recipe(trained, tmp_path, methods=["median"], scaling_coefs=[-30.0])
    said = succeed("search", file, "--out", out).out
    assert not (out / "merged").exists()
    assert f"merged model: {out}" not in said
    assert "no merged model: on validation data no candidate is better than the base" in said
    assert result_of(out)["best"]["method"] == "base"


def test_without_an_output_only_the_table_is_shown_and_quiet_says_nothing(trained, tmp_path):
    file = recipe(trained, tmp_path, methods=["median"], scaling_coefs=[0.3])
    before = files_in(tmp_path)
    said = succeed("search", file).out
    assert files_in(tmp_path) == before
    assert "median" in said
    assert "merged model" not in said
    outcome = succeed("search", file, "--quiet", "--out", tmp_path / "out")
    assert (outcome.out, outcome.err) == ("", "")
    problem = refusal(trained, "search", file, "--out", trained / VARIANTS[0], "--overwrite")
    assert "is, or holds, the input" in problem


def test_the_merged_folder_is_pushed_where_there_is_one(trained, tmp_path, monkeypatch):
    sent = []
    monkeypatch.setattr(hub, "push", lambda folder, name: sent.append((folder, name)) or "there")
    push, out = ("--push", "owner/name"), tmp_path / "out"
    file = recipe(trained, tmp_path, methods=["median"], scaling_coefs=[0.3])
    said = succeed("search", file, *push, "--dry-run").out
    assert "push to owner/name: " in said
    succeed("search", file, *push)
    assert not sent
    assert "pushed: there" in succeed("search", file, *push, "--out", out).out
    assert sent == [(out / "merged", "owner/name")]
    listed = said.split("push to owner/name: ")[1].strip().split(", ")
    assert listed == sorted(files_in(out / "merged"))
    file = recipe(trained, tmp_path, methods=["median"], scaling_coefs=[-30.0])
    assert "pushed" not in succeed("search", file, *push, "--out", out, "--overwrite").out
    assert len(sent) == 1


def test_options_go_before_the_recipe(trained: Path, tmp_path: Path):
    out = tmp_path / "out"
    file = recipe(trained, tmp_path, methods=["median"], grid="default", out=str(tmp_path / "no"))
    options = "--metric absolute --grid paper --seed 3 --memory 0 --threads 2 --batch-size 64"
    succeed("search", file, "--out", out, *options.split())
    wanted = {"metric": "absolute", "grid": "paper", "seed": 3, "memory": 0, "batch_size": 64}
    assert wanted.items() <= yaml.safe_load((out / "config.yaml").read_text()).items()
    result = result_of(out)
    assert (result["criterion"], result["seed"]) == ("absolute", 3)
    # median: a mean, by the paper
    assert [c["server_lr"] for c in result["candidates"]] == pytest.approx([0, 0.3, 0.8])
    assert not (tmp_path / "no").exists()


def test_a_race_chooses_what_an_exhaustive_search_does_and_says_what_it_saved(trained, tmp_path):
    file = recipe(trained, tmp_path, scaling_coefs=[0.1, 0.3, 0.5, 0.8, 5.0, 20.0])
    outs = whole, raced = tmp_path / "whole", tmp_path / "raced"
    succeed("search", file, "--out", whole)
    said = succeed("search", file, "--strategy", "racing", "--confidence", 0.9, "--out", raced).out
    best, found = (result_of(out)["best"] for out in outs)
    for name in ("method", "params", "scaling_coef", "val", "value"):
        assert found[name] == best[name]
    weights = [(out / "merged/model.safetensors").read_bytes() for out in outs]
    assert weights[0] == weights[1]
    held = yaml.safe_load((raced / "config.yaml").read_text())
    assert (held["strategy"], held["confidence"]) == ("racing", 0.9)
    evaluated, every = result_of(raced)["examples"].values()
    assert [*result_of(whole)["examples"].values()] == [every, every]
    rows = [r for r in read_rows(raced / "record.jsonl") if r["event"] == "candidate"]
    assert sum(r["evaluated"] or 0 for r in rows) == evaluated < every
    dropped = [r for r in rows if r["dropped_at"] is not None]
    assert len(rows) == len(result_of(whole)["candidates"]) > len(dropped) > 0
    with safe_open(raced / "scores.safetensors", "pt") as scores:
        kept = json.loads(scores.metadata()["candidates"])
    assert len(kept) == sum(r["dropped_at"] is None and r["same_as"] is None for r in rows)
    times = f"{every / evaluated:.1f} times fewer than"
    assert f"racing: {evaluated:,} examples evaluated, {times}" in said
    page = " ".join((raced / "report.html").read_text().split())
    assert f"{len(dropped)} of {len(rows)} candidates were dropped" in page
    assert f"{evaluated:,} examples were evaluated" in page
    assert "The search raced" not in (whole / "report.html").read_text()


def test_without_methods_every_rule_of_the_paper_is_searched():
    least = SearchRecipe.of(base="b", models=[{"path": "m", "data": "digits"}])
    methods = ["task_arithmetic", "fednova", "fedgma", "median", "cclip"]
    assert [method for method, _ in least.grids] == methods
    grid = least.scaling_coefs
    assert (len(grid), grid[0], grid[-1]) == (40, 0.05, 2.0)
    assert least.memory == 8_000_000_000


def test_scores_of_language_models_are_shown_as_they_are(tmp_path: Path):
    file, out = tmp_path / "recipe.yaml", tmp_path / "out"
    settings = language_recipe(tune_on_lines(tmp_path)).resolved()
    file.write_text(yaml.safe_dump(settings))
    said = succeed("search", file, "--out", out).out
    result = result_of(out)
    best = next(row for row in result["rows"] if row["rule"] == result["best"]["method"])
    assert f"{best['mean']:#.4g}" in said
    shares = [line.count("%") for line in said.splitlines() if "λ" in line]
    assert shares == [1] * len(result["rows"][1:])  # of what the own models gained
    assert "log-likelihood" in (out / "report.html").read_text()
    for name in result["tasks"]:
        assert score(out / "merged", tmp_path / name, tmp_path) == pytest.approx(best["test"][name])


# What is refused: one line, exit code 2, nothing written


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ("metod: []", 'unknown key "metod"; did you mean "methods"?'),
        ("methods: [fedgm]", 'unknown method "fedgm"; did you mean "fedgma"?'),
        ("methods: []", "methods: "),
        ("methods: [ties, {method: ties, density: 0.5}]", "methods: ties is named twice"),
        ("methods: [{rho: 1.0}]", "methods.0.method is missing"),
        ("methods: [{method: fedgma, roh: 1}]", 'key "methods.0.roh"; did you mean "'),
        ("methods: [{method: fedgma, rho: [0.5, high]}]", "methods.0.rho.1: "),
        ("methods: [{method: fedgma, rho: []}]", "rho is an empty list"),
        ("methods: [{method: fedgma, rho: 2.0}]", "fedgma: rho is 2"),
        ("methods: [{method: median, rho: 0.5}]", 'method median has no parameter "rho"'),
        ("scaling_coefs: []", "scaling_coefs: "),
        ("scaling_coefs: [.nan]", "scaling_coefs.0: must be a finite number"),
        ("grid: papr", "grid: "),
        ("strategy: rasing", 'strategy: unknown "rasing"; did you mean "racing"?'),
        ("confidence: 1.0", "confidence: must be less than 1"),
        ("confidence: 0.0", "confidence: must be greater than 0"),
        ("batch_size: 0", "batch_size: "),
        ("weights: [1.0]", "weights: 1 given for 2 models"),
        ("base: no/such/base", '"no/such/base": no such file or folder'),
        ("models: []", "models: "),
    ],
)
def test_a_recipe_with_a_mistake_is_refused(trained, tmp_path, changes: str, message: str):
    file = recipe(trained, tmp_path, **yaml.safe_load(changes))
    assert message in refusal(tmp_path, "search", file, "--out", tmp_path / "out")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": "digits:thik"}, 'did you mean "thick"?'),
        ({"data": "no/such/folder"}, "no/such/folder"),
        ({"data": None}, "models.0.data: "),
        ({"paht": "x"}, 'unknown key "models.0.paht"; did you mean "models[].path"?'),
        ({"head": "no.safetensors"}, 'head "no.safetensors" cannot be read'),
        ({"head": "ten-of-32"}, 'head "ten-of-32" '),
        ({"head": "three-of-16"}, 'head "three-of-16" '),
        ({"data": f"digits:{VARIANTS[1]}"}, "two models have one task"),
        ({"path": "bare"}, 'head "bare/head.safetensors" cannot be read'),
        ({"path": "bare", "head": "fits"}, 'model "bare": number of local steps is None'),
    ],
)
def test_an_entry_with_a_mistake_is_refused(trained, tmp_path, monkeypatch, changes, message):
    monkeypatch.chdir(tmp_path)
    for name, dim, count in (("ten-of-32", 32, 10), ("three-of-16", 16, 3), ("fits", 16, 10)):
        save_head(random_head(dim, tuple("0123456789"[:count]), torch.Generator()), Path(name))
    shutil.copytree(
        trained / VARIANTS[0], "bare", ignore=shutil.ignore_patterns("training*", "head*")
    )
    models = [entry(trained, **changes), entry(trained, VARIANTS[1])]
    methods = ["fednova"] if changes.get("head") == "fits" else ["median"]
    file = recipe(trained, tmp_path, models=models, methods=methods)
    assert message in refusal(tmp_path, "search", file, "--out", tmp_path / "out")
