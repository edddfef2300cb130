"""A mergekit configuration gives mergekit's numbers, and what it says that is not supported is said key by key."""

import json
import os
import runpy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors import safe_open
from safetensors.numpy import load_file

from checkpoint_files import cli, load, problems_of, succeed

ROOT = Path(__file__).parents[2]
FIXTURE = ROOT / "tests" / "fixtures" / "mergekit.safetensors"
"""Made by mergekit 0.1.5, see benchmarks/mergekit_reference.py."""

with safe_open(FIXTURE, "np") as file:
    SHAPES = {name: tuple(shape) for name, shape in json.loads(file.metadata()["shapes"]).items()}
    CONFIGS: dict[str, dict[str, Any]] = json.loads(file.metadata()["configs"])
VECTORS = load_file(FIXTURE)

script = runpy.run_path(str(ROOT / "benchmarks" / "mergekit_reference.py"), run_name="script")
PEER = os.environ.get("DELTAFL_MERGEKIT")


def tensors(name: str) -> dict[str, np.ndarray]:
    """One vector of the fixture as a model."""
    found, at = {}, 0
    for tensor, shape in SHAPES.items():
        size = int(np.prod(shape))
        found[tensor] = VECTORS[name][at : at + size].reshape(shape)
        at += size
    return found


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with the models of the fixture."""
    script["write_models"](tmp_path, {name: tensors(name) for name in ("base", "m0", "m1", "m2")})
    monkeypatch.chdir(tmp_path)
    return tmp_path


def merge(folder: Path, config: dict[str, Any], *options: object) -> dict[str, np.ndarray]:
    (folder / "mergekit.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    succeed("merge", "mergekit.yaml", "--out", "out", "--overwrite", *options)
    return {name: tensor.float().numpy() for name, tensor in load(folder / "out").items()}


def assert_same(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> None:
    """Equal up to a few roundings in float32 (its unit is 6e-8) of values up to about 2."""
    assert found.keys() == wanted.keys()
    for name in wanted:
        np.testing.assert_allclose(found[name], wanted[name], rtol=1e-6, atol=5e-7, err_msg=name)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_numbers_are_those_of_mergekit(name: str, folder: Path) -> None:
    assert_same(merge(folder, CONFIGS[name]), tensors(f"out {name}"))


def test_the_fixture_is_that_of_the_script() -> None:
    assert script["CONFIGS"] == CONFIGS
    assert {name: tuple(shape) for name, shape in script["shapes"]().items()} == SHAPES
    for name, made in script["inputs"]().items():
        assert all((made[tensor] == values).all() for tensor, values in tensors(name).items())


@pytest.mark.peer
@pytest.mark.skipif(PEER is None, reason="DELTAFL_MERGEKIT is not set to a mergekit-yaml program")
@pytest.mark.parametrize("name", CONFIGS)
def test_mergekit_itself_agrees(name: str, folder: Path) -> None:
    assert PEER
    assert_same(merge(folder, CONFIGS[name]), script["merged"](PEER, folder, CONFIGS[name]))


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
def test_dare_drops_by_density_and_rescales(method: str, folder: Path) -> None:
    """What is kept is divided by the density; mergekit rescales to the L1 norm, which has the same expectation."""
    densities = [{"filter": "mlp", "value": 0.25}, {"value": 1}]
    models = [{"model": "m2", "parameters": {"weight": 0.5, "density": densities}}]
    found = merge(folder, {"merge_method": method, "base_model": "base", "models": models})
    base, deltas = tensors("base"), {n: t - tensors("base")[n] for n, t in tensors("m2").items()}
    inside = []
    for name, delta in deltas.items():
        if "mlp" in name:
            moved = delta != 0
            inside.append((found[name] - base[name])[moved] / delta[moved])
        else:
            np.testing.assert_allclose(found[name], base[name] + 0.5 * delta, atol=5e-7)
    kept = np.concatenate(inside)
    assert set(kept.round(2)) == {0.0, 2.0}
    share = (kept > 1).mean()
    assert abs(share - 0.25) < 5 * np.sqrt(0.25 * 0.75 / len(kept))  # five standard deviations


def test_options_go_before_the_file_and_notes_say_what_makes_no_difference(folder: Path) -> None:
    config = CONFIGS["ties, sum"] | {"dtype": "bfloat16"}
    (folder / "mergekit.yaml").write_text(yaml.safe_dump(config))
    planned = succeed("merge", "mergekit.yaml", "--dry-run", "--dtype", "float32")
    assert "merge 3 models into base by ties" in planned.out
    assert planned.err.splitlines() == [
        "note: int8_mask: makes no difference with ties",
        "note: dtype: computed in float32 and rounded once, where mergekit computes in bfloat16",
    ]
    assert not (folder / "out").exists()
    assert_same(merge(folder, config, "--dtype", "float32"), tensors("out ties, sum"))
    unmoved = merge(folder, CONFIGS["task_arithmetic"], "--scaling-coef", "0")
    assert_same(unmoved, tensors("base"))
    succeed("inspect", "mergekit.yaml")


LEAST = {
    "merge_method": "ties",
    "base_model": "base",
    "models": [{"model": "m0", "parameters": {"weight": 1.0}}],
}


def said(folder: Path, config: dict[str, Any]) -> list[str]:
    (folder / "mergekit.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    outcome = cli("merge", "mergekit.yaml", "--out", "out")
    errors = [line for line in outcome.err.splitlines() if not line.startswith("note: ")]
    problems = problems_of(replace(outcome, err="\n".join(errors)))
    assert not (folder / "out").exists()
    return problems


UNSUPPORTED = """
merge_method: slerp
base_model: base+adapter
models:
  - {model: {model: {path: m0}, lora: {path: adapter}}, parameters: {weight: 1, gamma: 0.1}}
  - {model: m1, parameters: {weight: much, normalize: true}, layer_range: [0, 3]}
modules: {text: {}}
parameters: {t: 0.5, lambda: [1.0, x], rescale: 1, density: [{filtre: mlp, value: 1}]}
dtype: int8
tokenizer_source: union
tokenizer: {source: base, tokens: {<x>: {}}}
chat_template: auto
merge_methods: ties
"""


def test_every_key_that_is_not_supported_is_one_line(folder: Path) -> None:
    lines = said(folder, yaml.safe_load(UNSUPPORTED))
    wanted = [
        'merge_method: unknown "slerp"; known: dare_linear, dare_ties, linear',
        "base_model: must name a whole model, not 'base+adapter'; merge a LoRA into its model first",
        "models.0.model: must name a whole model",
        'unknown key "models.0.parameters.gamma"; known: density, weight',
        "models.1.parameters.weight: must be a valid number, not 'much'",
        'unknown key "models.1.parameters.normalize"; did you mean "parameters.normalize"?',
        'unknown key "models.1.layer_range"; did you mean "slices[].sources[].layer_range"?',
        "parameters.density: must be a number, a list of such over the layers, or a list of {filter",
        "parameters.lambda.1: must be a valid number, not 'x'",
        "parameters.rescale: must be a valid boolean, not 1",
        'unknown key "parameters.t"; known: density, int8_mask, lambda, normalize, rescale, weight',
        'dtype: unknown "int8"; known: bfloat16, float16, float32, float64',
        'tokenizer_source: unknown "union"; known: base',
        'unknown key "tokenizer.tokens"; ',
        'unknown key "modules"; did you mean "models"?',
        'unknown key "chat_template"; known: ',
        'unknown key "merge_methods"; did you mean "merge_method"?',
    ]
    assert len(lines) == len(wanted)
    assert all(any(line.startswith(start) for line in lines) for start in wanted)


LINEAR = {"merge_method": "linear", "parameters": {"normalize": False}}
SLICES = CONFIGS["slices"]["slices"]


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"base_model": None}, "base_model: is missing; ties merges differences from it"),
        ({"models": None}, "models: give models, or slices"),
        ({"models": [{"model": "base"}]}, "models: there is none beside the base"),
        ({"models": [{"model": "m0"}]}, 'weight: is missing for model "m0"'),
        ({"models": [*LEAST["models"]] * 2}, "models: one is given twice"),
        ({"parameters": {"density": 1.5}}, "ties: density is 1.5; it must be in [0, 1]"),
        ({"parameters": {"rescale": True}}, "parameters.rescale: must be false with ties, as it is by default"),
        ({"parameters": {"normalize": [True, False]}}, "parameters.normalize: must be a valid boolean"),
        ({"models": [{"model": "m0", "parameters": {"weight": -1}}]}, "weight: must not be negative with ties"),
        ({"merge_method": "dare_ties", "parameters": {"density": 0}}, "dare: drop_rate is 1; it must be in"),
        (LINEAR, "base_model: linear merges the models alone; list it among them with its weight"),
        (LINEAR | {"base_model": "m0", "models": CONFIGS["linear"]["models"]},
         "parameters.normalize: false needs weights of sum 1 with linear, not 1.7"),
        ({"models": None, "slices": SLICES[1:]}, "slices.0: must hold the same layers of all models, from layer 0 on"),
        ({"models": None, "slices": SLICES[:1]}, 'slices: they end at layer 2, and the layers of "base" do not'),
    ],
)  # fmt: skip
def test_what_a_method_cannot_do(changes: dict[str, Any], line: str, folder: Path) -> None:
    config = {k: v for k, v in (LEAST | changes).items() if v is not None}
    assert any(told.startswith(line) for told in said(folder, config))


def test_a_scale_pattern_that_means_nothing(folder: Path) -> None:
    given = {"base": "base", "models": ["m0"]}
    for patterns, line in (
        ({"lm_haed.*": 0.5}, 'scale_patterns: "lm_haed.*" matches no merged tensor'),
        ({"*": float("nan")}, "scale_patterns.*: must be a finite number, not nan"),
    ):
        assert said(folder, given | {"scale_patterns": patterns}) == [line]
