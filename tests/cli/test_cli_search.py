"""`deltafl search` from the outside."""

import csv
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open

from checkpoint_files import files_in, refusal, refused, succeed
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
        "models": [{"path": str(trained / v), "data": f"digits:{v}"} for v in VARIANTS],
        "methods": ["task_arithmetic", {"method": "fedgma", "rho": [0.4, 1.0]}],
        "scaling_coefs": [0.3, 0.8],
        "threads": 1,
    }
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(held | changes, sort_keys=False))
    return file


def entry(trained: Path, variant: str = VARIANTS[0], **changes: Any) -> Mapping[str, Any]:
    return {"path": str(trained / variant), "data": f"digits:{variant}"} | changes


def test_the_output_holds_everything_and_the_winner_scores_what_its_row_says(
    trained: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    said = succeed("search", recipe(trained, tmp_path), "--out", out).out
    assert sorted(f.name for f in out.iterdir()) == [
        "config.yaml", "merged", "record.jsonl", "report.html", "result.json", "scores.safetensors",
        "table.csv", "table.md", "table.tex",
    ]  # fmt: skip
    result = json.loads((out / "result.json").read_text())
    rows = read_rows(out / "record.jsonl")
    assert [r["event"] for r in rows] == ["candidate"] * (1 + 2 * (1 + 2)) + ["test"] * 4
    assert [r["value"] for r in rows if r["event"] == "candidate"] == [
        c["value"] for c in result["candidates"]
    ]
    with safe_open(out / "scores.safetensors", "pt") as scores:
        labels = json.loads(scores.metadata()["candidates"])
        means = {
            task: scores.get_tensor(task).double().mean(1).tolist() for task in result["tasks"]
        }
    evaluated = [c for c in result["candidates"] if c["same_as"] is None]
    assert len(labels) == len(evaluated)
    for i, c in enumerate(evaluated):
        assert labels[i].startswith(c["method"])
        assert {task: means[task][i] for task in means} == c["val"]
    best = result["best"]
    assert best["value"] == max(c["value"] for c in result["candidates"])
    for task, variant in zip(result["tasks"], VARIANTS, strict=True):
        succeed(
            "evaluate", "--models", out / "merged", "--data", f"digits:{variant}", "--split", "val",
            "--head", trained / "base" / HEAD_FILE, "--json", tmp_path / "scores.json",
        )  # fmt: skip
        (scores,) = json.loads((tmp_path / "scores.json").read_text())["results"]
        assert scores["score"] == best["val"][task]
    with (out / "table.csv").open() as file:
        table = list(csv.reader(file))
    assert [line[0] for line in table[1:]] == [r["rule"] for r in result["rows"]]
    for row in result["rows"]:
        assert row["rule"].replace("_", r"\_") in (out / "table.md").read_text()
        assert row["rule"].replace("_", r"\_") in (out / "table.tex").read_text()
        assert row["rule"] in (out / "report.html").read_text()
        assert row["rule"] in said
        assert f"{100 * row['mean']:.1f}" in said
    assert f"merged model: {out / 'merged'}" in said
    assert f"report: {out / 'report.html'}" in said
    assert yaml.safe_load((out / "config.yaml").read_text())["scaling_coefs"] == [0.3, 0.8]


def test_where_the_base_is_best_no_merged_model_is_written_and_the_command_says_so(
    trained: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    file = recipe(trained, tmp_path, methods=["median"], scaling_coefs=[-30.0])
    said = succeed("search", file, "--out", out).out
    assert not (out / "merged").exists()
    assert f"merged model: {out}" not in said
    assert "no merged model: on validation data no candidate is better than the base" in said
    assert json.loads((out / "result.json").read_text())["best"]["method"] == "base"


def test_without_an_output_only_the_table_is_shown(trained: Path, tmp_path: Path) -> None:
    file = recipe(trained, tmp_path, methods=["median"])
    before = files_in(tmp_path)
    said = succeed("search", file).out
    assert files_in(tmp_path) == before
    assert "median" in said
    assert "merged model" not in said


def test_quiet_says_nothing(trained: Path, tmp_path: Path) -> None:
    outcome = succeed(
        "search",
        recipe(trained, tmp_path, methods=["median"]),
        "--quiet",
        "--out",
        tmp_path / "out",
    )
    assert (outcome.out, outcome.err) == ("", "")


def test_streaming_gives_the_same_candidates_as_memory(trained: Path, tmp_path: Path) -> None:
    for memory in (0, "8GB"):
        succeed(
            "search",
            recipe(trained, tmp_path, methods=["fedgma"], memory=memory),
            "--out",
            tmp_path / f"out{memory}",
            "--quiet",
        )
    rows = [read_rows(tmp_path / f"out{memory}" / "record.jsonl") for memory in (0, "8GB")]
    assert rows[0] == rows[1]
    weights = [
        (tmp_path / f"out{memory}" / "merged/model.safetensors").read_bytes()
        for memory in (0, "8GB")
    ]
    assert weights[0] == weights[1]


def test_options_go_before_the_recipe(trained: Path, tmp_path: Path) -> None:
    file = recipe(
        trained,
        tmp_path,
        methods=["median"],
        metric="normalized",
        grid="default",
        out=str(tmp_path / "no"),
    )
    succeed(
        "search",
        file,
        "--out",
        tmp_path / "out",
        "--metric",
        "absolute",
        "--grid",
        "paper",
        "--seed",
        3,
        "--memory",
        0,
        "--threads",
        2,
        "--batch-size",
        64,
    )
    held = yaml.safe_load((tmp_path / "out/config.yaml").read_text())
    assert (held["metric"], held["grid"], held["seed"], held["out"]) == (
        "absolute",
        "paper",
        3,
        str(tmp_path / "out"),
    )
    assert (held["memory"], held["threads"], held["batch_size"]) == (0, 2, 64)
    result = json.loads((tmp_path / "out/result.json").read_text())
    assert (result["criterion"], result["seed"]) == ("absolute", 3)
    assert [c["server_lr"] for c in result["candidates"]] == pytest.approx(
        [0, 0.3, 0.8]
    )  # median: a mean, by the paper
    assert not (tmp_path / "no").exists()


def test_a_race_chooses_what_an_exhaustive_search_does_and_says_what_it_saved(
    trained: Path, tmp_path: Path
) -> None:
    file = recipe(trained, tmp_path, scaling_coefs=[0.1, 0.3, 0.5, 0.8, 5.0, 20.0])
    succeed("search", file, "--out", tmp_path / "whole")
    said = succeed(
        "search", file, "--strategy", "racing", "--confidence", 0.9, "--out", tmp_path / "raced"
    ).out
    whole, raced = (
        json.loads((tmp_path / name / "result.json").read_text()) for name in ("whole", "raced")
    )
    names = ("method", "params", "scaling_coef", "val", "value")
    assert [raced["best"][k] for k in names] == [whole["best"][k] for k in names]
    assert (tmp_path / "raced/merged/model.safetensors").read_bytes() == (
        tmp_path / "whole/merged/model.safetensors"
    ).read_bytes()
    held = yaml.safe_load((tmp_path / "raced/config.yaml").read_text())
    assert (held["strategy"], held["confidence"]) == ("racing", 0.9)
    examples = raced["examples"]
    assert whole["examples"] == {
        "evaluated": examples["exhaustive"],
        "exhaustive": examples["exhaustive"],
    }
    rows = [r for r in read_rows(tmp_path / "raced/record.jsonl") if r["event"] == "candidate"]
    assert sum(r["evaluated"] or 0 for r in rows) == examples["evaluated"] < examples["exhaustive"]
    dropped = [r for r in rows if r["dropped_at"] is not None]
    assert len(rows) == len(whole["candidates"]) > len(dropped) > 0
    with safe_open(tmp_path / "raced/scores.safetensors", "pt") as scores:
        kept = json.loads(scores.metadata()["candidates"])
    assert len(kept) == sum(r["dropped_at"] is None and r["same_as"] is None for r in rows)
    ratio = examples["exhaustive"] / examples["evaluated"]
    assert (
        f"racing: {examples['evaluated']:,} examples evaluated, {ratio:.1f} times fewer than"
        in said
    )
    page = " ".join((tmp_path / "raced/report.html").read_text().split())
    assert f"{len(dropped)} of {len(rows)} candidates were dropped" in page
    assert f"{examples['evaluated']:,} examples were evaluated" in page
    assert "The search raced" not in (tmp_path / "whole/report.html").read_text()


def test_without_methods_every_rule_of_the_paper_is_searched() -> None:
    least = SearchRecipe.of(base="b", models=[{"path": "m", "data": "digits"}])
    methods = ["task_arithmetic", "fednova", "fedgma", "median", "cclip"]
    assert [method for method, _ in least.grids] == methods
    grid = least.scaling_coefs
    assert (len(grid), grid[0], grid[-1]) == (40, 0.05, 2.0)
    assert least.memory == 8_000_000_000


def test_language_models_are_searched_and_their_scores_are_shown_as_they_are(
    tmp_path: Path,
) -> None:
    file, out = tmp_path / "recipe.yaml", tmp_path / "out"
    settings = language_recipe(tune_on_lines(tmp_path), metric="normalized").resolved()
    file.write_text(yaml.safe_dump(settings))
    problems = refused(tmp_path, "search", file, "--out", out)
    assert [
        p.startswith(f'task "{t}": log-likelihood')
        for p, t in zip(problems, ("sums", "days"), strict=True)
    ]
    said = succeed("search", file, "--out", out, "--metric", "absolute").out
    result = json.loads((out / "result.json").read_text())
    best = next(row for row in result["rows"] if row["rule"] == result["best"]["method"])
    assert f"{best['mean']:#.4g}" in said
    assert "%" not in said
    assert "log-likelihood" in (out / "report.html").read_text()
    for name in result["tasks"]:
        succeed(
            "evaluate", "--models", out / "merged", "--data", tmp_path / name, "--json", tmp_path / "scores.json",
        )  # fmt: skip
        (scores,) = json.loads((tmp_path / "scores.json").read_text())["results"]
        assert scores["score"] == pytest.approx(best["test"][name])


# What is refused: one line, exit code 2, nothing written


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metod": []}, 'unknown key "metod"; did you mean "methods"?'),
        ({"methods": ["fedgm"]}, 'unknown method "fedgm"; did you mean "fedgma"?'),
        ({"methods": []}, "methods: "),
        ({"methods": ["ties", {"method": "ties", "density": 0.5}]}, "methods: ties is named twice"),
        ({"methods": [{"rho": 1.0}]}, "methods.0.method is missing"),
        (
            {"methods": [{"method": "fedgma", "roh": 0.5}]},
            'unknown key "methods.0.roh"; did you mean "rho"?',
        ),
        ({"methods": [{"method": "fedgma", "rho": "high"}]}, "methods.0.rho: "),
        ({"methods": [{"method": "fedgma", "rho": [0.5, "high"]}]}, "methods.0.rho.1: "),
        ({"methods": [{"method": "fedgma", "rho": [0.5, True]}]}, "methods.0.rho.1: "),
        ({"methods": [{"method": "fedgma", "rho": []}]}, "rho is an empty list"),
        ({"methods": [{"method": "fedgma", "rho": 2.0}]}, "fedgma: rho is 2"),
        ({"methods": [{"method": "median", "rho": 0.5}]}, 'method median has no parameter "rho"'),
        ({"scaling_coefs": []}, "scaling_coefs: "),
        ({"scaling_coefs": ["much"]}, "scaling_coefs.0: "),
        ({"scaling_coefs": [float("nan")]}, "scaling_coefs.0: must be a finite number"),
        ({"grid": "papr"}, "grid: "),
        ({"metric": "best"}, "metric: "),
        ({"strategy": "rasing"}, 'strategy: unknown "rasing"; did you mean "racing"?'),
        ({"confidence": 1.0}, "confidence: must be less than 1"),
        ({"confidence": 0.0}, "confidence: must be greater than 0"),
        ({"confidence": "high"}, "confidence: "),
        ({"memory": "much"}, 'memory: "much" is not a size'),
        ({"batch_size": 0}, "batch_size: "),
        ({"seed": "x"}, "seed: "),
        ({"weights": [1.0]}, "weights: 1 numbers for 2 models"),
        ({"base": "no/such/base"}, '"no/such/base": no such file or folder'),
        ({"models": []}, "models: "),
    ],
)
def test_a_recipe_with_a_mistake_is_refused(
    trained: Path, tmp_path: Path, changes: Any, message: str
) -> None:
    problem = refusal(
        tmp_path, "search", recipe(trained, tmp_path, **changes), "--out", tmp_path / "out"
    )
    assert message in problem


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": "digits:thik"}, 'did you mean "thick"?'),
        ({"data": "no/such/folder"}, "no/such/folder"),
        ({"paht": "x"}, 'unknown key "models.0.paht"; did you mean "path"?'),
        ({"head": "no.safetensors"}, 'head "no.safetensors" cannot be read'),
        ({"data": f"digits:{VARIANTS[1]}"}, "two models have one task"),
        ({"num_steps": "many"}, "models.0.num_steps: "),
    ],
)
def test_an_entry_with_a_mistake_is_refused(
    trained: Path, tmp_path: Path, change: Any, message: str
) -> None:
    models = [entry(trained, **change), entry(trained, VARIANTS[1])]
    problem = refusal(
        tmp_path, "search", recipe(trained, tmp_path, models=models), "--out", tmp_path / "out"
    )
    assert message in problem


def test_an_entry_without_its_task_is_refused(trained: Path, tmp_path: Path) -> None:
    models = [{"path": str(trained / VARIANTS[0])}]
    problem = refusal(
        tmp_path, "search", recipe(trained, tmp_path, models=models), "--out", tmp_path / "out"
    )
    assert problem.startswith("models.0.data is missing")


def test_a_model_without_a_head_is_refused(trained: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        (bare / name).write_bytes((trained / VARIANTS[0] / name).read_bytes())
    models = [entry(trained, path=str(bare)), entry(trained, VARIANTS[1])]
    file = recipe(trained, tmp_path, models=models, methods=["median"])
    problem = refusal(tmp_path, "search", file, "--out", tmp_path / "out")
    assert problem.startswith(f'head "{bare / HEAD_FILE}" cannot be read')


@pytest.mark.parametrize(("dim", "classes"), [(32, 10), (16, 3)])
def test_a_head_of_another_model_or_task_is_refused(
    trained: Path, tmp_path: Path, dim: int, classes: int
) -> None:
    head = tmp_path / "other.safetensors"
    save_head(random_head(dim, tuple("0123456789"[:classes]), torch.Generator()), head)
    models = [entry(trained, head=str(head)), entry(trained, VARIANTS[1])]
    problem = refusal(
        tmp_path, "search", recipe(trained, tmp_path, models=models), "--out", tmp_path / "out"
    )
    assert problem.startswith(f'head "{head}" ')


def test_fednova_without_steps_names_the_model_and_the_flag(trained: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors", HEAD_FILE):
        (bare / name).write_bytes((trained / VARIANTS[0] / name).read_bytes())
    models = [entry(trained, path=str(bare)), entry(trained, VARIANTS[1])]
    file = recipe(trained, tmp_path, models=models, methods=["fednova"])
    assert 'model "bare": number of local steps is None' in refusal(
        tmp_path, "search", file, "--out", tmp_path / "out"
    )
    models = [entry(trained, path=str(bare), num_steps=10), entry(trained, VARIANTS[1])]
    succeed(
        "search",
        recipe(trained, tmp_path, models=models, methods=["fednova"]),
        "--out",
        tmp_path / "out",
    )


def test_every_mistake_is_told_at_once(trained: Path, tmp_path: Path) -> None:
    file = recipe(trained, tmp_path, metod=[], metric="best", batch_size=0)
    assert len(refused(tmp_path, "search", file, "--out", tmp_path / "out")) == 3


def test_an_existing_output_is_refused_and_replaced_whole_with_overwrite(
    trained: Path, tmp_path: Path
) -> None:
    out, file = tmp_path / "out", recipe(trained, tmp_path, methods=["median"], scaling_coefs=[0.3])
    succeed("search", file, "--out", out)
    assert refusal(tmp_path, "search", file, "--out", out).startswith(f'"{out}" exists')
    (out / "notes.txt").write_text("old")
    succeed("search", file, "--out", out, "--overwrite")
    assert not (out / "notes.txt").exists()


def test_an_output_that_is_an_input_is_refused(trained: Path, tmp_path: Path) -> None:
    file = recipe(trained, tmp_path, methods=["median"])
    problem = refusal(trained, "search", file, "--out", trained / VARIANTS[0], "--overwrite")
    assert "is, or holds, the input" in problem
