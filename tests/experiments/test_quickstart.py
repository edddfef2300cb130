"""`deltafl quickstart`: the whole story, small; and at full size twice, with the same numbers."""

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from checkpoint_files import refusal, succeed
from deltafl.experiments import quickstart
from deltafl.merge.search_recipe import SearchRecipe
from deltafl.training import Finetuned, TrainingRecipe
from deltafl.training.record import read_rows

RULES = ["task_arithmetic", "fednova", "fedgma", "median", "cclip"]
TASKS = {n: {**own, "steps": 3 + i} for i, (n, own) in enumerate([*quickstart.VARIANTS.items()][:2])}  # fmt: skip


class Story(NamedTuple):
    """What a small run left: its folder, what it said, its result."""

    out: Path
    said: str
    result: dict[str, Any]


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Story:
    """Two tasks, some steps, two coefficients and one rho."""
    out = tmp_path_factory.mktemp("quickstart") / "story"
    train, recipe = quickstart.finetune, quickstart.search_recipe
    rho = {"method": "fedgma", "rho": 0.6}, {"method": "cclip", "unit": "quantile", "rho": 0.5}
    methods = ["task_arithmetic", "fednova", rho[0], "median", rho[1]]

    def shorter(net: Any, task: Any, recipe: TrainingRecipe, **how: Any) -> Finetuned:
        return train(net, task, recipe.replace(steps=min(recipe.steps or 0, 20)), **how)

    def smaller(*args: Any) -> SearchRecipe:
        return recipe(*args).replace(methods=methods, scaling_coefs=(0.3, 0.8))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quickstart, "VARIANTS", TASKS)
        patch.setattr(quickstart, "search_recipe", smaller)
        patch.setattr(quickstart, "finetune", shorter)
        said = succeed("quickstart", "--out", out, "--seed", 1).out
    return Story(out, said, json.loads((out / "result.json").read_text()))


def test_a_run_leaves_table_report_record_and_models(story: Story) -> None:
    out, result = story.out, story.result
    tables = {f"table.{suffix}" for suffix in ("csv", "md", "tex")}
    assert {f.name for f in out.iterdir()} >= {
        "config.yaml",
        "record.jsonl",
        "report.html",
        *tables,
    }
    assert [r["rule"] for r in result["rows"]][2:] == RULES
    assert result["tasks"] == [f"digits_{name}" for name in TASKS]
    assert (result["seed"], result["command"]) == (1, "deltafl quickstart --seed 1")
    assert (out / "merged/model.safetensors").is_file() == (result["best"]["method"] != "base")
    assert sum(r["event"] == "test" for r in read_rows(out / "record.jsonl")) == len(result["rows"])
    assert all(rule in (out / "report.html").read_text() for rule in RULES)
    assert refusal(out.parent, "quickstart", "--out", out).startswith(f'"{out}" exists')


def test_the_table_shows_the_results_and_the_way_to_the_report(story: Story) -> None:
    cells = {line[0]: line for line in map(re.compile("  +").split, story.said.splitlines())}
    assert cells["model"][1] == "mean"
    for row in story.result["rows"]:
        assert cells[row["rule"]][1] == f"{row['mean']:.1%}"
    assert str(story.out / "report.html") in story.said


def test_fine_tunes_start_from_the_base_with_its_head_and_differ_in_steps(story: Story) -> None:
    head, base = ((story.out / f"base/{n}.safetensors").read_bytes() for n in ("head", "model"))
    for name, own in TASKS.items():
        folder = story.out / "models" / name
        assert (folder / "head.safetensors").read_bytes() == head
        assert json.loads((folder / "training.json").read_text())["num_steps"] == own["steps"]
        assert (folder / "model.safetensors").read_bytes() != base


def test_there_are_four_or_more_tasks_with_different_learning_rates_and_steps() -> None:
    tasks = quickstart.VARIANTS.values()
    assert len(tasks) >= 4
    assert all(len({own[key] for own in tasks}) > 1 for key in ("lr", "steps"))


@pytest.mark.slow
def test_the_same_seed_gives_the_same_numbers(tmp_path: Path) -> None:
    results = []
    for name in ("a", "b"):
        succeed("quickstart", "--out", tmp_path / name, "--seed", 3, "--quiet")
        results.append(json.loads((tmp_path / name / "result.json").read_text()))
    assert all(r.pop("seconds") > 0 for r in results)
    assert results[0] == results[1]
    for folder in ("merged", "base", *(f"models/{name}" for name in quickstart.VARIANTS)):
        a, b = ((tmp_path / n / folder / "model.safetensors").read_bytes() for n in ("a", "b"))
        assert a == b, folder
