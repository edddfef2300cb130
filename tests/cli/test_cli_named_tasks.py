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
FEDERATED = (
    "--num-clients",
    2,
    "--participation-rate",
    1,
    "--num-rounds",
    1,
    "--local-steps",
    1,
    "--batch-size",
    4,
)


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
                    Image.new("RGB", (8, 8), (120 * place + 5 * i, 40, 90)).save(
                        folder / f"{i}.png"
                    )
    return tmp_path / "data"


def test_federate_and_centralized_take_a_name_and_a_zero_shot_head(
    data: Path, tmp_path: Path
) -> None:
    tiny_clip(tmp_path / "clip")
    shared = ("--model", tmp_path / "clip", "--data-dir", data, "--head", "zero-shot", *COMMON)
    succeed("federate", *shared, *FEDERATED, "--out", tmp_path / "fed")
    succeed("centralized", *shared, "--epochs", 1, "--batch-size", 8, "--out", tmp_path / "all")
    heads = [load_head(tmp_path / run / "model" / "head.safetensors") for run in ("fed", "all")]
    assert torch.equal(heads[0].weight, heads[1].weight)
    assert all(head.normalised for head in heads)
    assert json.loads((tmp_path / "fed" / "result.json").read_text())["test_examples"] == 6


def test_mask_and_shards_and_suite_take_a_name(data: Path, tmp_path: Path) -> None:
    succeed(
        "mask", "--model", VIT, "--data", "pcam", "--data-dir", data, "--device", "cpu", "--num-clients", 2,
        "--participation-rate", 1, "--sparsity-ratio", 0.5, "--mask-strategy", "random", "--out", tmp_path / "mask",
    )  # fmt: skip
    assert json.loads((tmp_path / "mask" / "mask.json").read_text())["made"]["task"] == "pcam"
    said = succeed("shards", "pcam", "--data-dir", data, "--num-clients", 2).out
    assert "pcam" in said
    succeed("suite", "heterogeneity", "--model", VIT, "--data-dir", data, "--head", "linear", *COMMON, *FEDERATED,
            "--nc-values", 1, "--j-values", 1, "--out", tmp_path / "suite")  # fmt: skip
    assert json.loads((tmp_path / "suite" / "suite.json").read_text())["task"] == "pcam"


def test_a_search_over_two_named_tasks_with_the_bases_zero_shot_heads(
    data: Path, tmp_path: Path
) -> None:
    clip = tmp_path / "clip"
    tiny_clip(clip)
    models = []
    for name in ("pcam", "rendered_sst2"):
        out = tmp_path / name
        succeed("finetune", "--base", clip, "--data", name, "--data-dir", data, "--head", "zero-shot", "--steps", 2,
                "--lr", 1e-3, "--batch-size", 8, "--device", "cpu", "--quiet", "--out", out)  # fmt: skip
        models.append({"path": str(out), "data": name, "head": "zero-shot"})
    held = {
        "base": str(clip),
        "models": models,
        "methods": ["task_arithmetic"],
        "scaling_coefs": [0.5],
        "threads": 1,
    }
    asked, own = tmp_path / "asked.yaml", tmp_path / "own.yaml"
    asked.write_text(yaml.safe_dump(held | {"data_dir": str(data)}))
    own.write_text(yaml.safe_dump(held | {"models": [m | {"head": None} for m in models]}))
    succeed("search", asked, "--out", tmp_path / "a")
    succeed("search", own, "--data-dir", data, "--out", tmp_path / "b")
    rows = [
        json.loads((tmp_path / run / "result.json").read_text())["candidates"] for run in ("a", "b")
    ]
    assert [r["value"] for r in rows[0]] == [r["value"] for r in rows[1]]


@pytest.mark.parametrize("command", ["finetune", "federate", "centralized"])
def test_an_unknown_name_is_one_line(command: str, data: Path, tmp_path: Path) -> None:
    model = ("--base" if command == "finetune" else "--model", VIT)
    size = () if command == "federate" else ("--epochs", 1)
    said = refusal(
        tmp_path,
        command,
        *model,
        "--data",
        "pcan",
        "--data-dir",
        data,
        *size,
        "--out",
        tmp_path / "out",
    )
    assert f'there is no folder "{data / "pcan"}"' in said
    assert 'did you mean "pcam"' in said


def test_templates_change_the_zero_shot_head_of_a_run(data: Path, tmp_path: Path) -> None:
    tiny_clip(tmp_path / "clip")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("tissue that is {}\n")
    shared = ("--model", tmp_path / "clip", "--data-dir", data, "--head", "zero-shot", *COMMON)
    for name, more in (("own", ("--templates", prompts)), ("theirs", ())):
        succeed("federate", *shared, *FEDERATED, *more, "--out", tmp_path / f"fed-{name}")
    succeed(
        "centralized",
        *shared,
        "--epochs",
        1,
        "--batch-size",
        8,
        "--templates",
        prompts,
        "--out",
        tmp_path / "all",
    )
    heads = {
        r: load_head(tmp_path / r / "model" / "head.safetensors").weight
        for r in ("fed-own", "fed-theirs", "all")
    }
    assert torch.equal(heads["fed-own"], heads["all"])
    assert not torch.equal(heads["fed-own"], heads["fed-theirs"])
    for command in ("federate", "centralized"):
        said = refusal(tmp_path, command, "--model", VIT, "--data-dir", data, *COMMON, "--templates", prompts,
                       *(FEDERATED if command == "federate" else ()), "--out", tmp_path / "x")  # fmt: skip
        assert "templates are about the zero-shot head" in said
