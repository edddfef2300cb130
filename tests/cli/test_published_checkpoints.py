"""The recipe of the published CLIP checkpoints, on small models and data of the same layout."""

import csv
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from PIL import Image

from checkpoint_files import refusal, succeed
from deltafl.models.head import save_head
from deltafl.models.zero_shot import zero_shot_head
from deltafl.recipe_file import load_yaml
from deltafl.rules.rule import load_rules
from deltafl.tasks.catalogue import catalogue
from tiny_models import tiny_clip

RECIPE = Path(__file__).parents[2] / "configs" / "clip-vit-b-32-ta8.yaml"


def write_task(folder: Path, name: str) -> list[str]:
    """Images of every class in `train/CLASS/` (two) and `test/CLASS/` (one); the class names."""
    words = catalogue()[name].class_names or [
        f"{name} kind {i:03d}" for i in range(catalogue()[name].num_classes)
    ]
    for i, word in enumerate(words):
        for split, count in (("train", 2), ("test", 1)):
            own = folder / name / split / word
            own.mkdir(parents=True)
            for j in range(count):
                Image.new("RGB", (8, 8), (37 * i % 256, 91 * i % 256, 10 * j)).save(
                    own / f"{j}.png"
                )
    return sorted(words)


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The recipe as it is, but for where models and data are and for the number of coefficients."""
    monkeypatch.setenv("DELTAFL_CACHE", str(tmp_path / "cache"))
    held = load_yaml(RECIPE)
    tiny_clip(tmp_path / "clip")
    tower = transformers.CLIPVisionModel.from_pretrained(tmp_path / "clip")
    start = {name: tensor.clone() for name, tensor in tower.state_dict().items()}
    for i, entry in enumerate(held["models"]):
        draw = torch.Generator().manual_seed(i)
        moved = {n: t + 0.01 * torch.randn(t.shape, generator=draw) if t.is_floating_point() else t
                 for n, t in start.items()}  # fmt: skip
        tower.load_state_dict(moved)
        entry["path"] = str(tmp_path / Path(entry["path"]).name)
        tower.save_pretrained(entry["path"])
        write_task(tmp_path / "data", entry["data"])
    changes = {
        "base": str(tmp_path / "clip"),
        "scaling_coefs": [0.3],
        "out": str(tmp_path / "out"),
        "threads": 1,
    }
    changes |= {"metric": "absolute"}  # some of these models are right on no validation image
    return held | changes | {"data_dir": str(tmp_path / "data")}


def write(folder: Path, recipe: dict[str, Any]) -> Path:
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return file


def test_the_recipe_runs_and_prints_theirs_beside_ours(
    recipe: dict[str, Any], tmp_path: Path
) -> None:
    held_fixed = list(recipe["fixed"])
    said = succeed("search", write(tmp_path, recipe)).out
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert {row["rule"] for row in result["rows"][2:]} == {*load_rules(), *held_fixed}
    rows_of = {row["rule"]: row for row in result["rows"]}
    third = rows_of[
        "task arithmetic, lambda 0.3"
    ]  # the search has 0.3 only, so this is its task_arithmetic
    assert third["test"] == rows_of["task_arithmetic"]["test"]
    assert (third["scaling_coef"], third["val"]) == (0.3, None)
    assert rows_of["simple average"]["server_lr"] == pytest.approx(1)
    assert result["reference"]["TIES, lambda 0.3"] == pytest.approx(0.722)
    cells = {line[0]: line for line in map(re.compile("  +").split, said.splitlines())}
    assert cells["model"][2] == "published"
    published = {"base (unmerged)": "48.2%", "single-task models": "90.3%", "simple average": "66.5%",
                 "task arithmetic, lambda 0.3": "68.0%", "TIES, lambda 0.3": "72.2%", "ties": "–"}  # fmt: skip
    assert {name: cells[name][2] for name in published} == published
    with (tmp_path / "out" / "table.csv").open() as file:
        rows = {row["model"]: row for row in csv.DictReader(file)}
    assert list(rows)[-3:] == list(published)[2:5]
    assert {name: rows[name]["published"] for name in ("base (unmerged)", "simple average", "ties")} == {
        "base (unmerged)": "0.482", "simple average": "0.665", "ties": "",
    }  # fmt: skip
    assert all(rows[name]["mean"] for name in ("simple average", "ties"))
    for file in ("table.md", "table.tex", "report.html"):
        assert all(
            word in (tmp_path / "out" / file).read_text()
            for word in ("published", "simple average", "66.5")
        )
    assert "not run here" in (tmp_path / "out" / "report.html").read_text()


def test_templates_and_saved_heads_take_the_place_of_the_built_in_prompts(
    recipe: dict[str, Any], tmp_path: Path
) -> None:
    entries = [entry for entry in recipe["models"] if entry["data"] in ("eurosat", "mnist")]
    small = recipe | {
        "models": entries,
        "methods": ["task_arithmetic"],
        "reference": {},
        "fixed": {},
    }
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("seen: {}\n")
    heads = []
    for entry in entries:
        names = sorted(catalogue()[entry["data"]].class_names or ())
        head = zero_shot_head(recipe["base"], entry["data"], names, templates=["seen: {}"])
        save_head(head, tmp_path / f"{entry['data']}.safetensors")
        heads.append(entry | {"head": str(tmp_path / f"{entry['data']}.safetensors")})
    runs = {
        "built in": small,
        "ours": small | {"templates": str(prompts)},
        "saved": small | {"models": heads},
    }
    found = {}
    for name, held in runs.items():
        said = succeed("search", write(tmp_path, held | {"out": str(tmp_path / name)})).out
        assert "published" not in said
        found[name] = json.loads((tmp_path / name / "result.json").read_text())["rows"]
    assert found["ours"] == found["saved"]
    assert found["ours"] != found["built in"]
    wrong = write(tmp_path, small | {"models": heads, "templates": str(prompts)})
    said = refusal(tmp_path, "search", wrong)
    assert said == "templates: are about the zero-shot head; give models that have head: zero-shot"


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"method": "ties"}, "fixed.mine.scaling_coef is missing"),
        ({"scaling_coef": 0.3}, "fixed.mine.method is missing"),
        (
            {"method": "ties", "scaling_coef": 0.3, "densty": 1},
            'unknown key "fixed.mine.densty"; did you mean "density"?',
        ),
    ],
)
def test_a_fixed_candidate_that_is_none_is_one_line(
    tmp_path: Path, entry: dict[str, Any], message: str
) -> None:
    said = refusal(
        tmp_path, "search", write(tmp_path, load_yaml(RECIPE) | {"fixed": {"mine": entry}})
    )
    assert said.startswith(message)


def test_a_reference_that_is_no_percentage_is_one_line(tmp_path: Path) -> None:
    held = load_yaml(RECIPE)
    said = refusal(tmp_path, "search", write(tmp_path, held | {"reference": {"ties": 722.0}}))
    assert said == "reference.ties: must be less than or equal to 100, not 722.0"
