"""`deltafl inspect` from the outside."""

import json
import re

import pytest
import torch
from safetensors.torch import save_file

from checkpoint_files import World, files_in, load, refusal, save, succeed, tuned

FILES = ["figure.png", "inspect.json", "report.html"]


def args(world: World, *models: str) -> list[str]:
    names = [str(world.root / name) for name in models or ("m0", "m1")]
    return ["inspect", "--base", str(world.root / "base"), "--models", *names]


def test_the_text_tells_norms_training_cosines_signs_and_advice(world: World):
    facts = {"num_steps": 40, "lr": 0.1, "task": "cars"}
    save(world.root / "m2", tuned(world.base, 2, 0.08), training=facts)
    said = succeed(*args(world, "m0", "m2"), "--num-steps", 10, 40).out
    head, _, *lines = said.splitlines()
    columns = ["model", "task", "learning rate", "steps", "length of the delta"]
    assert re.split(r" {2,}", head) == columns
    table = {line.split()[0]: line.split() for line in reversed(lines) if line.startswith("m")}
    assert table["m0"][1:4] == ["–", "–", "10"]
    assert table["m2"][1:4] == ["cars", "0.1", "40"]
    deltas = {n: m.double() - world.base[n] for n, m in world.models[0].items() if n != "steps"}
    norm = sum(float((delta**2).sum()) for delta in deltas.values()) ** 0.5
    assert float(table["m0"][-1]) == pytest.approx(norm, rel=1e-3)
    advice = ("- Local steps differ 4-fold: fednova", "- Norms differ 8-fold")
    copied = "copied from the base: 1 tensors (not a float tensor (I64))"
    assert all(part in said for part in ("cosine", "same sign", "overlap", *advice, copied))


def test_an_output_holds_report_figure_and_numbers(world: World):
    before = files_in(world.root)
    succeed(*args(world))
    assert files_in(world.root) == before, "nothing is written without an output"
    said = succeed(*args(world), "--out", world.out).out
    assert str(world.out / "report.html") in said
    assert sorted(files_in(world.out)) == FILES
    held = json.loads((world.out / "inspect.json").read_text())
    assert held["models"] == ["m0", "m1"]
    assert held["overlap_layers"].keys() == {"embed", "layer.0"}
    assert (world.out / "figure.png").read_bytes().startswith(b"\x89PNG\r\n")
    page = (world.out / "report.html").read_text()
    assert all(line.split(":")[0] in page for line in held["advice"])


def test_one_model_and_a_zero_delta_have_a_report_too(world: World):
    said = succeed(*args(world, "m0"), "--out", world.out).out
    assert "One model: merging only scales its delta." in said
    save(world.root / "same", world.base)
    said = succeed(*args(world, "m0", "same"), "--out", world.out, "--overwrite").out
    assert "- same: equal to the base; leave it out." in said
    assert json.loads((world.out / "inspect.json").read_text())["cosine"]["matrix"][0][1] is None


def test_what_is_wrong_is_one_line(world: World):
    inputs = refusal(world.root, *args(world), "--out", world.root / "m0", "--overwrite")
    assert "is, or holds, the input" in inputs
    base = ("inspect", "--base", world.root / "base")
    assert "--models" in refusal(world.root, *base)
    assert "--models" in refusal(world.root, *base, "--modells", world.root / "m0")
    held = load(world.root / "m1")
    for change, told in (
        (torch.full((9, 8), torch.inf), 'model "m1": tensor "embed.weight" differs from the base'),
        (torch.ones(11, 8), '"embed.weight": 11 rows, the base has 9; another vocabulary?'),
    ):
        save_file(held | {"embed.weight": change}, world.file("m1"))
        assert told in refusal(world.root, *args(world), "--out", world.out)
