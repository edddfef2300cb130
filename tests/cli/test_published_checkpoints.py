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
from deltafl.rules.building import delta_rules
from deltafl.tasks import Images, ImageTask
from deltafl.tasks.catalogue import catalogue
from deltafl.tasks.task import SPLITS
from tiny_models import tiny_clip

RECIPE = Path(__file__).parents[2] / "configs" / "clip-vit-b-32-ta8.yaml"


def write_task(folder: Path, name: str) -> None:
    """Images of every class in `train/CLASS/` (two) and `test/CLASS/` (one)."""
    known = catalogue()[name]
    words = known.class_names or [f"{name} kind {i:03d}" for i in range(known.num_classes)]
    for i, word in enumerate(words):
        for split, count in (("train", 2), ("test", 1)):
            (own := folder / name / split / word).mkdir(parents=True)
            for j in range(count):
                colour = (37 * i % 256, 91 * i % 256, 10 * j)
                Image.new("RGB", (8, 8), colour).save(own / f"{j}.png")


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
    places = {"base": str(tmp_path / "clip"), "data_dir": str(tmp_path / "data")}
    # absolute: some of these models are right on no validation image
    return held | places | {"scaling_coefs": [0.3], "threads": 1, "metric": "absolute"}


def searched(recipe: dict[str, Any], out: Path) -> tuple[str, dict[str, Any]]:
    """What a search says, and its result."""
    out.parent.mkdir(exist_ok=True)
    file = out.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(recipe, sort_keys=False))
    said = succeed("search", file, "--out", out).out
    return said, json.loads((out / "result.json").read_text())


def refused(recipe: dict[str, Any], folder: Path) -> str:
    (folder / "wrong.yaml").write_text(yaml.safe_dump(recipe))
    return refusal(folder, "search", folder / "wrong.yaml")


def test_the_recipe_runs_and_prints_theirs_beside_ours(recipe: dict[str, Any], tmp_path: Path):
    out = tmp_path / "out"
    said, result = searched(recipe, out)
    assert {row["rule"] for row in result["rows"][2:]} == {*delta_rules(), *recipe["fixed"]}
    rows = {row["rule"]: row for row in result["rows"]}
    third = rows["task arithmetic, lambda 0.3"]  # the search has 0.3 only, so it is its own
    assert third["test"] == rows["task_arithmetic"]["test"]
    assert (third["scaling_coef"], third["val"]) == (0.3, None)
    assert rows["simple average"]["server_lr"] == pytest.approx(1)
    assert result["reference"]["TIES, lambda 0.3"] == pytest.approx(0.722)
    cells = {line[0]: line for line in map(re.compile("  +").split, said.splitlines())}
    assert cells["model"][2] == "published"
    published = {"base (unmerged)": "48.2%", "single-task models": "90.3%", "simple average": "66.5%",
                 "task arithmetic, lambda 0.3": "68.0%", "TIES, lambda 0.3": "72.2%", "ties": "–"}  # fmt: skip
    assert {name: cells[name][2] for name in published} == published
    with (out / "table.csv").open() as file:
        table = {row["model"]: row for row in csv.DictReader(file)}
    assert list(table)[-3:] == list(published)[2:5]
    shares = {"base (unmerged)": "0.482", "simple average": "0.665", "ties": ""}
    assert {name: table[name]["published"] for name in shares} == shares
    assert all(table[name]["mean"] for name in ("simple average", "ties"))
    for file in ("table.md", "table.tex", "report.html"):
        text = (out / file).read_text()
        assert all(word in text for word in ("published", "simple average", "66.5"))
    assert "not run here" in (out / "report.html").read_text()


def test_templates_and_saved_heads_take_the_place_of_the_built_in_prompts(recipe, tmp_path):
    entries = [entry for entry in recipe["models"] if entry["data"] in ("eurosat", "mnist")]
    alone = {"methods": ["task_arithmetic"], "reference": {}, "fixed": {}}
    small = recipe | alone | {"models": entries}
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("seen: {}\n")
    heads = []
    for entry in entries:
        names = tuple(sorted(catalogue()[entry["data"]].class_names or ()))
        part = Images(torch.zeros(1, 3, 8, 8).byte(), torch.zeros(1).long())
        task = ImageTask(entry["data"], dict.fromkeys(SPLITS, part), names)
        head = zero_shot_head(recipe["base"], task, str(prompts))
        save_head(head, tmp_path / f"{entry['data']}.safetensors")
        heads.append(entry | {"head": str(tmp_path / f"{entry['data']}.safetensors")})
    ours, saved = {"templates": str(prompts)}, {"models": heads}
    found = {}
    for name, changes in {"built in": {}, "ours": ours, "saved": saved}.items():
        said, result = searched(small | changes, tmp_path / "runs" / name)
        assert "published" not in said
        found[name] = result["rows"]
    assert found["ours"] == found["saved"] != found["built in"]
    wrong = refused(small | ours | saved, tmp_path)
    assert wrong == "templates: are about the zero-shot head; give models that have head: zero-shot"


MINE = {"method": "ties", "scaling_coef": 0.3}
MISTAKES = {
    "fixed.mine.scaling_coef is missing": {"fixed": {"mine": {"method": "ties"}}},
    "fixed.mine.method is missing": {"fixed": {"mine": {"scaling_coef": 0.3}}},
    'unknown key "fixed.mine.densty"; did you mean': {"fixed": {"mine": MINE | {"densty": 1}}},
    "reference.ties: must be less than or equal to 100": {"reference": {"ties": 722.0}},
}


@pytest.mark.parametrize("told", MISTAKES)
def test_a_row_of_the_table_that_cannot_be_is_one_line(tmp_path: Path, told: str):
    assert refused(load_yaml(RECIPE) | MISTAKES[told], tmp_path).startswith(told)
