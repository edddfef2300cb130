"""`deltafl mask` against the federated run that takes its mask, and its page."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from checkpoint_files import files_in, refusal, succeed
from deltafl.federated import FederatedRecipe, federate
from deltafl.models import load_net
from federated.worlds import halves
from tiny_models import vit_file

TASK = "tiny_models:tiny_task_factory"
VIT = vit_file()
MASK = ("mask", "--base", VIT, "--data", TASK)
SETTINGS = {
    "num_clients": 8, "participation_rate": 0.25, "head": "linear", "sharding": "dirichlet", "alpha": 0.5,
    "sparsity_ratio": 0.8, "mask_strategy": "most_sensitive", "mask_scope": "per_layer", "calibration": "progressive",
    "calibration_rounds": 3, "calibration_examples": 5, "fisher_draws": 2, "seed": 4, "device": "cpu",
}  # fmt: skip
RECIPE = FederatedRecipe.of(
    model=VIT, data=TASK, num_rounds=2, local_steps=2, batch_size=4, lr=0.05, **SETTINGS
)


class Attention(nn.Module):
    """A plug-in with query, key and value in one tensor."""

    input_size, channels, mean, std = 8, 1, (0.25,), (0.5,)

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def embed(self, x: Tensor) -> Tensor:
        x = x.flatten(1, 2)
        return self.attention(x, x, x, need_weights=False)[0].mean(1)


def bits(folder: Path) -> dict[str, np.ndarray]:
    """Read as the format says, without our reader: 8 coordinates a byte, the first in the lowest bit."""
    with safe_open(folder / "mask.safetensors", framework="np") as held:
        shapes = json.loads(held.metadata()["deltafl"])["shapes"]
        read = {
            name: np.unpackbits(held.get_tensor(name), count=math.prod(shape), bitorder="little")
            for name, shape in shapes.items()
        }
        return {name: read[name].reshape(shape) for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("mask") / "out"
    options = [x for key, value in SETTINGS.items() for x in (f"--{key.replace('_', '-')}", value)]
    succeed(*MASK, *options, "--out", out)
    return out


def test_it_is_the_mask_of_the_federated_run_and_serves_it(made: Path, tmp_path: Path):
    """Equal masks, and a run that is given the file ends with the bits of the one that calibrates."""
    calibrated, given = tmp_path / "calibrated", tmp_path / "given"
    federate(load_net(VIT), halves(), RECIPE.replace(out=str(calibrated)))
    ours, theirs = bits(made), bits(calibrated)
    assert ours.keys() == theirs.keys()
    assert all((ours[name] == theirs[name]).all() for name in ours)
    finished = {"mask_file": str(made / "mask.safetensors"), "sparsity_ratio": 0.0}
    federate(load_net(VIT), halves(), RECIPE.replace(out=str(given), **finished))
    weights = [(out / "model/model.safetensors").read_bytes() for out in (given, calibrated)]
    assert weights[0] == weights[1]


def test_the_file_and_the_table_tell_what_is_kept(made: Path):
    assert sorted(files_in(made)) == ["figure.png", "mask.json", "mask.safetensors", "report.html"]
    told, held = json.loads((made / "mask.json").read_text()), bits(made)
    assert [t["name"] for t in told["tensors"]] == list(held)
    for tensor in told["tensors"]:
        name = tensor["name"]
        excluded = name.endswith("k_proj.bias")
        assert tensor["kept"] == held[name].sum()
        assert tensor["eligible"] == (0 if excluded else held[name].size)
        # per_layer: k = round(0.2 n) of each tensor, the last of three steps of 0.2^(1/3)
        assert tensor["kept"] == round(0.2 * tensor["eligible"])
        assert tensor["share"] == (0 if excluded else tensor["kept"] / held[name].size)
        assert (name in told["excluded"]) == excluded
    assert told["kept"] == sum(m.sum() for m in held.values())
    assert told["parameters"] == sum(m.size for m in held.values()) == told["eligible"] + 2 * 16
    assert SETTINGS.items() - {("device", "cpu")} <= told["made"].items()
    page = (made / "report.html").read_text()
    excluded = "k_proj.bias</code> in 2 layers: an attention key bias: softmax is shift-invariant"
    assert excluded in page
    assert page.count("<svg") == 1


def test_describe_tells_the_same_with_the_model_and_counts_all_without(made: Path, tmp_path: Path):
    describe = ("mask", "--describe", made / "mask.safetensors")
    told = json.loads((made / "mask.json").read_text())
    said = succeed(*describe, "--base", VIT, "--out", tmp_path / "again").out
    assert json.loads((tmp_path / "again" / "mask.json").read_text()) == told
    assert not (tmp_path / "again" / "mask.safetensors").exists()
    assert f"{told['kept']:,} of {told['eligible']:,} eligible coordinates kept" in said
    q = [t for t in told["tensors"] if t["name"].endswith("q_proj.weight")]
    lines = {line.split()[0]: line.split()[1:] for line in said.splitlines() if line}
    kept, eligible = sum(t["kept"] for t in q), sum(t["eligible"] for t in q)
    row = ["2", str(kept), str(eligible), f"{kept / eligible:.2%}"]
    assert lines["encoder.layers.*.attention.q_proj.weight"] == row
    alone = succeed(*describe).out
    assert f"{told['kept']:,} of {told['parameters']:,} coordinates" in alone
    assert "mask_strategy most_sensitive" in " ".join(alone.split())
    assert "made for another model" in refusal(made, *describe, "--base", vit_file(seed=1))


def test_query_key_and_value_of_one_tensor_are_told_apart(tmp_path: Path):
    torch.manual_seed(0)
    given = ("--sparsity-ratio", 0.5, "--mask-strategy", "random", "--num-clients", 3, "--participation-rate", 1,
             "--head", "linear", "--device", "cpu", "--out", tmp_path / "out")  # fmt: skip
    succeed("mask", "--base", "test_cli_mask:Attention", "--data", TASK, *given)
    told, held = json.loads((tmp_path / "out" / "mask.json").read_text()), bits(tmp_path / "out")
    rows = {t["name"]: t for t in told["tensors"]}
    for i, letter in enumerate("qkv"):
        for name in ("encoder.attention.in_proj_weight", "encoder.attention.in_proj_bias"):
            part, row = held[name][8 * i : 8 * i + 8], rows[f"{name}[{letter}]"]
            assert row["kept"] == part.sum()
            assert row["eligible"] == (0 if name.endswith("bias") and letter == "k" else part.size)


MISTAKES = {
    "sparsity_ratio 0 freezes nothing": MASK,
    'mask_file "m" is a finished mask; see it with --describe': (*MASK, "--mask-file", "m"),
    'mask "none.safetensors" cannot be read': ("mask", "--describe", "none.safetensors"),
    'unknown key "seed"; known: describe, device, model': ("mask", "--describe", "m", "--seed", 3),
}


@pytest.mark.parametrize("told", MISTAKES)
def test_a_mistake_is_one_line_and_nothing_is_written(told: str, tmp_path: Path):
    assert told in refusal(tmp_path, *MISTAKES[told], "--out", tmp_path / "out")
