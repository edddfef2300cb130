"""The README.md of a merged folder, as huggingface_hub reads it."""

from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard

from checkpoint_files import World, load, make_world, save, succeed

OWN = "---\nlicense: llama3\nlanguage:\n- en\n- nb\nbase_model: some/older\n---\n# The base\n"


@pytest.fixture
def world(tmp_path: Path) -> World:
    world = make_world(tmp_path)
    (tmp_path / "base/README.md").write_text(OWN)
    return world


def card_of(folder: Path) -> ModelCard:
    return ModelCard.load(folder / "README.md")


def recipe_of(folder: Path) -> str:
    return card_of(folder).text.split("```yaml\n")[1].split("```")[0]


HOW = {
    "options": ["--scaling-coef", 0.3, "--weights", 1, -0.5],
    "a rule": ["--method", "ties", "--density", 0.3, "--exclude", "embed.*", "--dtype", "float16"],
    "an adapter": ["--as-adapter", 2, "--exclude", "norm*", "*.bias", "embed.*"],
}


@pytest.mark.parametrize("how", HOW.values(), ids=HOW)
def test_its_recipe_makes_the_folder_again(world: World, how: list[object]) -> None:
    succeed(*world.args, *how)
    text = recipe_of(world.out)
    assert not {"out", "threads", "max_shard_size"} & yaml.safe_load(text).keys()
    (world.root / "again.yaml").write_text(text)
    succeed("merge", world.root / "again.yaml", "--out", world.root / "again")
    first, again = load(world.out), load(world.root / "again")
    assert first.keys() == again.keys()
    assert all(torch.equal(tensor, again[name]) for name, tensor in first.items())


def test_it_is_the_merges_and_license_and_language_are_the_bases(world: World) -> None:
    succeed(*world.args, "--scaling-coef", 0.3, "--weights", 1, 0.5)
    card = card_of(world.out)
    assert card.data.to_dict() == {
        "library_name": "transformers",
        "license": "llama3",
        "language": ["en", "nb"],
        "tags": ["merge", "deltafl"],
    }
    assert "# out\n" in card.text
    assert (
        "`task_arithmetic` at lambda = 0.3 on the sum of the deltas (server_lr 0.45 on" in card.text
    )
    assert f"| m1 | `{world.root / 'm1'}` | 0.5 |" in card.text
    assert "The base" not in card.text
    assert "test split" not in card.text


def test_an_adapters_is_as_peft_wants_it(world: World) -> None:
    succeed(*world.args, *HOW["an adapter"])
    data = card_of(world.out).data.to_dict()
    assert (data["library_name"], data["tags"]) == ("peft", ["merge", "deltafl", "lora"])


@pytest.mark.parametrize("adapter", [False, True])
def test_models_of_the_hub_are_named_and_folders_are_not(world, monkeypatch, adapter) -> None:
    places = {"owner/base": world.root / "base", "owner/m0": world.root / "m0"}
    asked = []

    def download(name: str, allow_patterns: list[str], **_: object) -> str:
        asked.append(allow_patterns)
        return str(places[name])

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    models = ("--models", "owner/m0@main", world.root / "m1")
    how = HOW["an adapter"] if adapter else ()
    succeed("merge", "--base", "owner/base", *models, *how, "--out", world.out)
    data = card_of(world.out).data.to_dict()
    assert data["base_model"] == (["owner/base"] if adapter else ["owner/base", "owner/m0"])
    assert data["license"] == "llama3"
    assert all("README.md" in patterns for patterns in asked)


@pytest.mark.parametrize("text", ["# plain", "---\na: [\n---\n", "---\n- x\n---\n", "---\nx", ""])
def test_a_base_whose_card_says_nothing(tmp_path: Path, text: str) -> None:
    world = make_world(tmp_path)
    (tmp_path / "base/README.md").write_text(text)
    succeed(*world.args)
    assert card_of(world.out).data.to_dict().keys() == {"library_name", "tags"}


def test_a_model_that_transformers_does_not_load_names_no_library(tmp_path: Path) -> None:
    world = make_world(tmp_path)
    bare = save(tmp_path / "bare", world.base, config=None)
    succeed(*world.args, "--base", bare)
    assert card_of(world.out).data.to_dict() == {"tags": ["merge", "deltafl"]}
