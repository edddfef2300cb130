"""Tasks by name and zero-shot heads in the commands that take a task."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from checkpoint_files import refusal, succeed
from deltafl.models.head import load_head
from tiny_models import tiny_clip, vit_file

VIT = vit_file(num_hidden_layers=1, num_channels=3)
COMMON = ("--data", "pcam", "--device", "cpu", "--quiet")
CLIENTS = ("--num-clients", 2, "--participation-rate", 1)
FEDERATED = (*CLIENTS, "--num-rounds", 1, "--local-steps", 1, "--batch-size", 4)


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two tasks of two classes in one folder, as images, and a cache of their own."""
    monkeypatch.setenv("DELTAFL_CACHE", str(tmp_path / "cache"))
    words = {"pcam": ("healthy", "tumour"), "rendered_sst2": ("negative", "positive")}
    for name, classes in words.items():
        for split, count in (("train", 10), ("test", 3)):
            for place, word in enumerate(classes):
                folder = tmp_path / "data" / name / split / word
                folder.mkdir(parents=True)
                for i in range(count):
                    colour = (120 * place + 5 * i, 40, 90)
                    Image.new("RGB", (8, 8), colour).save(folder / f"{i}.png")
    return tmp_path / "data"


def test_federate_and_centralized_take_a_name_a_zero_shot_head_and_templates(data, tmp_path):
    tiny_clip(tmp_path / "clip")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("tissue that is {}\n")
    shared = ("--model", tmp_path / "clip", "--data-dir", data, "--head", "zero-shot", *COMMON)
    heads = {}
    for own in ((), ("--templates", prompts)):
        out = tmp_path / str(len(own))
        succeed("federate", *shared, *FEDERATED, *own, "--out", out / "fed")
        succeed(
            "centralized", *shared, *own, "--epochs", 1, "--batch-size", 8, "--out", out / "all"
        )
        files = [out / run / "model" / "head.safetensors" for run in ("fed", "all")]
        heads[own], other = map(load_head, files)
        assert torch.equal(heads[own].weight, other.weight)
        assert heads[own].normalised
    assert not torch.equal(*(head.weight for head in heads.values()))
    assert json.loads((out / "fed" / "result.json").read_text())["test_examples"] == 6
    for command, size in (("federate", FEDERATED), ("centralized", ())):
        wrong = ("--model", VIT, "--data-dir", data, *COMMON, "--templates", prompts, *size)
        said = refusal(tmp_path, command, *wrong, "--out", tmp_path / "x")
        assert "templates are about the zero-shot head" in said


def test_mask_and_shards_and_suite_take_a_name(data: Path, tmp_path: Path):
    task = ("--model", VIT, "--data", "pcam", "--data-dir", data, "--device", "cpu")
    random = ("--sparsity-ratio", 0.5, "--mask-strategy", "random")
    succeed("mask", *task, *CLIENTS, *random, "--out", tmp_path / "mask")
    assert json.loads((tmp_path / "mask" / "mask.json").read_text())["made"]["task"] == "pcam"
    assert "pcam" in succeed("shards", "pcam", "--data-dir", data, "--num-clients", 2).out
    values = ("--head", "linear", "--nc-values", 1, "--j-values", 1, "--quiet")
    succeed("suite", "heterogeneity", *task, *FEDERATED, *values, "--out", tmp_path / "suite")
    assert json.loads((tmp_path / "suite" / "suite.json").read_text())["task"] == "pcam"


def test_a_search_over_two_named_tasks_with_the_bases_zero_shot_heads(data: Path, tmp_path: Path):
    clip, models = tmp_path / "clip", []
    tiny_clip(clip)
    for name in ("pcam", "rendered_sst2"):
        out = tmp_path / name
        succeed("finetune", "--base", clip, "--data", name, "--data-dir", data, "--head", "zero-shot", "--steps", 2,
                "--lr", 1e-3, "--batch-size", 8, "--device", "cpu", "--quiet", "--out", out)  # fmt: skip
        models.append({"path": str(out), "data": name, "head": "zero-shot"})
    held = {"base": str(clip), "methods": ["task_arithmetic"], "scaling_coefs": [0.5], "threads": 1}
    asked = held | {"models": models, "data_dir": str(data)}
    own = held | {"models": [m | {"head": None} for m in models]}
    values = []
    for name, recipe, options in (("a", asked, ()), ("b", own, ("--data-dir", data))):
        (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
        succeed("search", tmp_path / "r.yaml", *options, "--out", tmp_path / name)
        rows = json.loads((tmp_path / name / "result.json").read_text())["candidates"]
        values.append([row["value"] for row in rows])
    assert values[0] == values[1]


@pytest.mark.parametrize("command", ["finetune", "federate", "centralized"])
def test_an_unknown_name_is_one_line(command: str, data: Path, tmp_path: Path):
    size = () if command == "federate" else ("--epochs", 1)
    wrong = ("--model", VIT, "--data", "pcan", "--data-dir", data, *size)
    said = refusal(tmp_path, command, *wrong, "--out", tmp_path / "out")
    assert f'there is no folder "{data / "pcan"}"' in said
    assert 'did you mean "pcam"' in said
