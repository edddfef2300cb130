"""`deltafl inspect` from the outside."""

import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

from checkpoint_files import World, files_in, load, make_world, refusal, save, succeed, tuned


@pytest.fixture
def world(tmp_path: Path) -> World:
    return make_world(tmp_path)


def args(world: World, *models: str) -> list[str]:
    names = models or ("m0", "m1")
    return [
        "inspect",
        "--base",
        str(world.root / "base"),
        "--models",
        *(str(world.root / n) for n in names),
    ]


def test_the_text_tells_norms_training_cosines_signs_and_advice(world: World) -> None:
    save(
        world.root / "m2",
        tuned(world.base, 2, 0.08),
        training={"num_steps": 40, "lr": 0.1, "task": "cars"},
    )
    said = succeed(*args(world, "m0", "m2"), "--num-steps", 10, 40).out
    head, _, *lines = said.splitlines()
    columns = ("model", "task", "learning rate", "steps", "examples", "length of the delta")
    assert re.split(r" {2,}", head) == [c for c in columns if c != "examples"]
    table = {line.split()[0]: line.split() for line in reversed(lines) if line.startswith("m")}
    assert table["m0"][1:4] == ["–", "–", "10"]
    assert table["m2"][1:4] == ["cars", "0.1", "40"]
    norm = sum(
        float(((m.double() - world.base[n].double()) ** 2).sum())
        for n, m in world.models[0].items()
        if n != "steps"
    )
    assert float(table["m0"][-1]) == pytest.approx(norm**0.5, rel=1e-3)
    for part in (
        "cosine",
        "same sign",
        "- Local steps differ 4-fold: fednova",
        "- Norms differ 8-fold",
    ):
        assert part in said


def test_what_is_outside_is_told(world: World) -> None:
    assert "copied from the base: 1 tensors (not a float tensor (I64))" in succeed(*args(world)).out


def test_nothing_is_written_without_an_output(world: World) -> None:
    before = files_in(world.root)
    succeed(*args(world))
    assert files_in(world.root) == before


def test_an_output_holds_report_figure_and_numbers(world: World) -> None:
    outcome = succeed(*args(world), "--out", world.out)
    assert sorted(f.name for f in world.out.iterdir()) == [
        "figure.png",
        "inspect.json",
        "report.html",
    ]
    held = json.loads((world.out / "inspect.json").read_text())
    assert held["models"] == ["m0", "m1"]
    assert (world.out / "figure.png").read_bytes().startswith(b"\x89PNG\r\n")
    page = (world.out / "report.html").read_text()
    for line in held["advice"]:
        assert line.split(":")[0] in page
    assert str(world.out / "report.html") in outcome.out


def test_an_existing_output_is_refused(world: World) -> None:
    succeed(*args(world), "--out", world.out)
    assert "exists" in refusal(world.root, *args(world), "--out", world.out)


def test_overwrite_replaces_an_earlier_report(world: World) -> None:
    succeed(*args(world), "--out", world.out)
    (world.out / "figure.png").write_bytes(b"old")
    succeed(*args(world, "m1"), "--out", world.out, "--overwrite")
    assert json.loads((world.out / "inspect.json").read_text())["models"] == ["m1"]
    assert sorted(f.name for f in world.out.iterdir()) == [
        "figure.png",
        "inspect.json",
        "report.html",
    ]


@pytest.mark.parametrize("name", ["base", "m0"])
def test_an_output_that_is_an_input_is_refused(world: World, name: str) -> None:
    assert "is, or holds, the input" in refusal(
        world.root, *args(world), "--out", world.root / name, "--overwrite"
    )


def test_a_zero_delta_has_no_cosine_and_still_a_report(world: World) -> None:
    save(world.root / "same", world.base)
    said = succeed(*args(world, "m0", "same"), "--out", world.out).out
    assert "- same: equal to the base; leave it out." in said
    assert json.loads((world.out / "inspect.json").read_text())["cosine"]["matrix"][0][1] is None


def test_one_model_can_be_inspected(world: World) -> None:
    assert (
        "One model: merging only scales its delta."
        in succeed(*args(world, "m0"), "--out", world.out).out
    )


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_delta_that_is_not_finite_is_an_error_and_nothing_is_written(
    world: World, bad: float
) -> None:
    held = load(world.root / "m1")
    held["layer.0.weight"][3, 4] = torch.tensor(bad)
    save_file(held, world.file("m1"))
    problem = refusal(world.root, *args(world), "--out", world.out)
    assert problem.startswith(
        'model "m1": tensor "layer.0.weight" differs from the base by NaN or Inf'
    )


def test_a_model_that_does_not_fit_is_an_error(world: World) -> None:
    held = load(world.root / "m1")
    held["embed.weight"] = torch.ones(11, 8)
    save_file(held, world.file("m1"))
    assert '"embed.weight" is (11, 8)' in refusal(world.root, *args(world), "--out", world.out)


def test_a_recipe_gives_what_the_options_give(world: World) -> None:
    recipe = {
        "base": str(world.root / "base"),
        "models": [str(world.root / "m0"), str(world.root / "m1")],
    }
    (world.root / "r.yaml").write_text(yaml.safe_dump(recipe))
    assert succeed("inspect", world.root / "r.yaml").out == succeed(*args(world)).out


def test_a_misspelt_option_is_an_error_that_offers_the_right_one(world: World) -> None:
    assert "--models" in refusal(
        world.root, "inspect", "--base", world.root / "base", "--modells", world.root / "m0"
    )


def test_base_and_models_are_needed(world: World) -> None:
    assert "--models" in refusal(world.root, "inspect", "--base", world.root / "base")
