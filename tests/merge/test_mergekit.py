"""A mergekit configuration gives mergekit's numbers, and what it says that is not supported is said key by key."""

import json
import os
import re
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
    """A quarter of a tensor is kept, with the L1 norm that the tensor had; or, with rescale: false, as it is."""
    densities = [{"filter": "mlp", "value": 0.25}, {"value": 1}]
    models = [{"model": "m2", "parameters": {"weight": 0.5, "density": densities}}]
    config = {"merge_method": method, "base_model": "base", "models": models}
    for rescale in (True, False):
        found = merge(folder, config | {"parameters": {"rescale": rescale}})
        base, deltas = (
            tensors("base"),
            {n: t - tensors("base")[n] for n, t in tensors("m2").items()},
        )
        kept = []
        for name, delta in deltas.items():
            moved = (found[name] != base[name]) | (delta == 0)
            norm = np.abs(delta).sum(dtype=np.float64) / np.abs(delta[moved]).sum(dtype=np.float64)
            wanted = base[name] + 0.5 * (norm if rescale else 1) * delta * moved
            np.testing.assert_allclose(found[name], wanted, atol=1e-6)
            if "mlp" in name:
                kept += [*moved.flatten()]
        share = np.mean(kept)
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


WRONG = """
merge_method: slurp
base_model: {model: {path: base}, tower: x}
models:
  - {model: {model: {path: m0}, lora: {path: adapter}}, parameters: {weight: 1, gama: 0.1}}
  - {model: m1, parameters: {weight: much, normalize: true}, layer_range: [0, 3]}
parameters: {lambda: [1.0, x], density: [{filtre: mlp, value: 1}], normalise: true}
dtype: int8
merge_methods: ties
"""


def test_every_key_that_is_wrong_is_one_line(folder: Path) -> None:
    lines = said(folder, yaml.safe_load(WRONG))
    wanted = [
        'merge_method: unknown "slurp"; did you mean "slerp"?',
        "base_model: must name a model, not {'model': {'path': 'base'}, 'tower': 'x'}",
        'unknown key "models.0.parameters.gama"; did you mean "models[].parameters.gamma"?',
        "models.1.parameters.weight: must be a valid number, not 'much'",
        'unknown key "models.1.layer_range"; did you mean "slices[].sources[].layer_range"?',
        "parameters.density: must be a number, a list of such over the layers, or a list of {filter",
        "parameters.lambda.1: must be a valid number, not 'x'",
        'unknown key "parameters.normalise"; did you mean "parameters.normalize"?',
        'dtype: unknown "int8"; known: bfloat16, float16, float32, float64',
        'unknown key "merge_methods"; did you mean "merge_method"?',
    ]
    assert all(any(line.startswith(start) for line in lines) for start in wanted), lines
    assert len(lines) == len(wanted)


LINEAR = {"merge_method": "linear", "parameters": {"normalize": False}}
SLICES = CONFIGS["slices"]["slices"]


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"base_model": None}, "base_model: is missing; ties merges differences from it"),
        ({"models": None}, "models: give models, or slices"),
        ({"models": [{"model": "m0"}]}, 'weight: is missing for model "m0"'),
        ({"parameters": {"density": 1.5}}, "ties: density is 1.5; it must be in [0, 1]"),
        ({"parameters": {"normalize": [True, False]}}, "parameters.normalize: must be the same for all tensors"),
        ({"models": [{"model": "m0", "parameters": {"weight": -1}}]}, "weight: must not be negative with ties"),
        ({"merge_method": "dare_ties", "parameters": {"density": 0}}, "dare: drop_rate is 1; it must be in"),
        (LINEAR, 'weight: is missing for model "base"'),
        ({"merge_method": "slerp"}, "t: is missing"),
        ({"parameters": {"rescale": True}}, "parameters.rescale: must be false with ties, as it is by default"),
        ({"merge_method": "multislerp", "parameters": {"normalize_weights": False}},
         "parameters.normalize_weights: must be true, as it is by default"),
        ({"merge_method": "slerp", "models": [{"model": "m0"}, {"model": "m1"}]},
         "models: slerp takes 1 beside the base, not 2"),
        ({"models": None, "slices": [{"sources": [{"model": "m0", "layer_range": [0, 5]}]}]},
         '"base[0:5]": "base" has no layers 0 to 5, but 3'),
        ({"models": None, "slices": [{"sources": [{"model": "base", "layer_range": [0, 1]},
                                                  {"model": "m0", "layer_range": [0, 2]}]}]},
         "slices.0: the sources must have equally many layers"),
    ],
)  # fmt: skip
def test_what_a_method_cannot_do(changes: dict[str, Any], line: str, folder: Path) -> None:
    config = {k: v for k, v in (LEAST | changes).items() if v is not None}
    lines = said(folder, config)
    assert any(told.startswith(line) for told in lines), lines


def layer(model: str, name: str, number: int) -> np.ndarray:
    return tensors(model)[name.format(number)]


def names_of_layers() -> list[str]:
    """Of layer 0, with {} for its number."""
    return [name.replace(".0.", ".{}.") for name in SHAPES if ".0." in name]


def sources(*parts: tuple[str, int, int], **parameters: Any) -> dict[str, Any]:
    return {
        "sources": [
            {"model": model, "layer_range": [start, stop], "parameters": parameters}
            for model, start, stop in parts
        ]
    }


def test_layers_are_stacked(folder: Path) -> None:
    config = {"architectures": ["X"], "num_hidden_layers": 2, "layer_types": ["a", "b"]}
    (folder / "m0" / "config.json").write_text(json.dumps(config))
    slices = [sources(("m0", 0, 2)), sources(("m1", 1, 2), scale=[{"filter": "mlp", "value": 0.5}])]
    found = merge(folder, {"merge_method": "passthrough", "slices": slices})
    assert names_of_layers()
    for name in names_of_layers():
        factor = 0.5 if "mlp" in name else 1
        wanted = [layer("m0", name, 0), layer("m0", name, 1), factor * layer("m1", name, 1)]
        for number, tensor in enumerate(wanted):
            assert (found[name.format(number)] == tensor).all()
    outside = {name for name in SHAPES if not re.search(r"\.\d\.", name)}
    assert outside <= found.keys()
    for name in outside:
        first = "embed" in name
        assert (found[name] == tensors("m0" if first else "m1")[name]).all()
    written = json.loads((folder / "out" / "config.json").read_text())
    assert (written["num_hidden_layers"], written["layer_types"]) == (3, ["a", "b", "b"])
    said = succeed("merge", "mergekit.yaml", "--out", "out", "--overwrite").out
    assert said.startswith("wrote m0[0:2],m1[1:2] by passthrough: out")
    assert "written by deltafl" in (folder / "out" / "README.md").read_text()


def test_layers_are_merged_and_stacked(folder: Path) -> None:
    """A model that a slice does not have has no delta there; each slice has weights of its own."""
    config = LEAST | {
        "merge_method": "task_arithmetic",
        "slices": [
            sources(("base", 0, 1), ("m0", 0, 1), weight=0.5),
            sources(("base", 0, 2), ("m1", 0, 2), weight=2),
        ],
    }
    del config["models"]
    found = merge(folder, config)
    for name in names_of_layers():
        for number, (model, there, weight) in enumerate(
            [("m0", 0, 0.5), ("m1", 0, 2), ("m1", 1, 2)]
        ):
            base = layer("base", name, there).astype(np.float64)
            wanted = base + weight * (layer(model, name, there) - base)
            np.testing.assert_allclose(found[name.format(number)], wanted, atol=5e-7)


def test_slices_that_are_all_layers_of_a_model_are_that_model(folder: Path) -> None:
    merge(folder, CONFIGS["slices"])
    record = json.loads((folder / "out" / "deltafl.json").read_text())
    assert {record["base"]["ref"], *(m["ref"] for m in record["models"])} <= {
        "base",
        "m0",
        "m1",
        "m2",
    }


def test_linear_need_not_be_normalised(folder: Path) -> None:
    weights = {"m0": 1.0, "m1": 0.25, "m2": -0.5}
    models = [{"model": name, "parameters": {"weight": w}} for name, w in weights.items()]
    found = merge(folder, LINEAR | {"models": models})
    for name in SHAPES:
        wanted = sum(w * tensors(model)[name].astype(np.float64) for model, w in weights.items())
        np.testing.assert_allclose(found[name], wanted, atol=5e-7)


def test_a_later_document_names_what_an_earlier_one_made(folder: Path) -> None:
    first = {
        "name": "first", "merge_method": "linear", "parameters": {"weight": 1},
        "models": [{"model": "m0"}, {"model": "m1"}],
    }  # fmt: skip
    last = LEAST | {"merge_method": "task_arithmetic"}
    last["models"] = [{"model": "first", "parameters": {"weight": 0.5}}]
    text = yaml.safe_dump_all([last, first])
    (folder / "several.yaml").write_text(text)
    succeed("merge", "several.yaml", "--out", "out")
    found = {name: tensor.numpy() for name, tensor in load(folder / "out").items()}
    for name in SHAPES:
        base, a, b = (tensors(model)[name].astype(np.float64) for model in ("base", "m0", "m1"))
        np.testing.assert_allclose(found[name], base + 0.5 * ((a + b) / 2 - base), atol=5e-7)
    assert {file.name for file in folder.iterdir()} == {
        "base",
        "m0",
        "m1",
        "m2",
        "out",
        "several.yaml",
    }
    succeed("merge", "several.yaml", "--out", "new/folder/out")
    assert load(folder / "new/folder/out").keys() == found.keys()
    planned = succeed("merge", "several.yaml", "--out", "other", "--dry-run")
    assert planned.out.endswith("then other, of what that makes\n")
    (folder / "several.yaml").write_text(
        yaml.safe_dump_all([last, first | {"models": [{"model": "last"}]}])
    )
    circle = [last | {"name": "last"}, first | {"models": [{"model": "last"}]}, LEAST]
    for documents, line in (
        ([first, first, last], "several documents: give each but one a name of its own"),
        (circle, "several documents: they name one another in a circle: last, first"),
    ):
        (folder / "several.yaml").write_text(yaml.safe_dump_all(documents))
        assert problems_of(cli("merge", "several.yaml", "--out", "other")) == [line]


def test_a_scale_pattern_that_means_nothing(folder: Path) -> None:
    given = {"base": "base", "models": ["m0"]}
    for patterns, line in (
        ({"lm_haed.*": 0.5}, 'scale_patterns: "lm_haed.*" matches no merged tensor'),
        ({"*": float("nan")}, "scale_patterns.*: must be a finite number, not nan"),
    ):
        assert said(folder, given | {"scale_patterns": patterns}) == [line]
