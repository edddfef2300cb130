"""`deltafl mask` against the federated run that takes its mask, and its page."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from safetensors import safe_open
from torch import Tensor, nn

from deltafl.cli.mask import mask
from deltafl.errors import DeltaflError
from deltafl.federated import FederatedRecipe, federate
from deltafl.models import load_net
from federated.worlds import halves
from tiny_models import vit_file

TASK = "tiny_models:tiny_task_factory"
VIT = vit_file()
RECIPE = FederatedRecipe.of(
    model=VIT, data=TASK, device="cpu", num_clients=8, participation_rate=0.25, num_rounds=2,
    local_steps=2, batch_size=4, lr=0.05, head="linear", sharding="dirichlet", alpha=0.5,
    sparsity_ratio=0.8, mask_strategy="most_sensitive", mask_scope="per_layer",
    calibration="progressive", calibration_rounds=3, calibration_examples=5, fisher_draws=2, seed=4,
)  # fmt: skip
OPTIONS = (
    "--num-clients", 8, "--participation-rate", 0.25, "--head", "linear", "--sharding", "dirichlet", "--alpha", 0.5,
    "--sparsity-ratio", 0.8, "--mask-strategy", "most_sensitive", "--mask-scope",
    "per_layer", "--calibration", "progressive", "--calibration-rounds", 3, "--calibration-examples", 5,
    "--fisher-draws", 2, "--seed", 4, "--device", "cpu",
)  # fmt: skip


class Attention(nn.Module):
    """A plug-in with query, key and value in one tensor."""

    input_size, channels, mean, std = 8, 1, (0.25,), (0.5,)

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def embed(self, x: Tensor) -> Tensor:
        x = x.flatten(1, 2)
        return self.attention(x, x, x, need_weights=False)[0].mean(1)


def run(*arguments: object, ok: bool = True) -> Result:
    result = CliRunner().invoke(mask, [str(a) for a in arguments])
    if ok and result.exception:
        raise result.exception
    return result


def bits(file: Path) -> dict[str, np.ndarray]:
    """Read as the format says, without our reader: 8 coordinates a byte, the first in the lowest bit."""
    with safe_open(file, framework="np") as held:
        shapes = json.loads(held.metadata()["deltafl"])["shapes"]
        return {
            name: np.unpackbits(
                held.get_tensor(name), count=math.prod(shape), bitorder="little"
            ).reshape(shape)
            for name, shape in shapes.items()
        }


def weights(folder: Path) -> bytes:
    return (folder / "model" / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("mask") / "out"
    run("--base", VIT, "--data", TASK, *OPTIONS, "--out", out)
    return out


def test_it_is_the_mask_of_the_federated_run_and_serves_it(made: Path, tmp_path: Path):
    """Equal masks, and a run that is given the file ends with the bits of the one that calibrates."""
    federate(load_net(VIT), halves(), RECIPE.replace(out=str(tmp_path / "calibrated")))
    ours, theirs = (
        bits(made / "mask.safetensors"),
        bits(tmp_path / "calibrated" / "mask.safetensors"),
    )
    assert ours.keys() == theirs.keys()
    assert all((ours[name] == theirs[name]).all() for name in ours)
    given = RECIPE.replace(
        mask_file=str(made / "mask.safetensors"), sparsity_ratio=0.0, out=str(tmp_path / "given")
    )
    federate(load_net(VIT), halves(), given)
    assert weights(tmp_path / "given") == weights(tmp_path / "calibrated")


def test_the_file_and_the_table_tell_what_is_kept(made: Path):
    assert sorted(p.name for p in made.iterdir()) == [
        "figure.png",
        "mask.json",
        "mask.safetensors",
        "report.html",
    ]
    told = json.loads((made / "mask.json").read_text())
    held = bits(made / "mask.safetensors")
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
    assert (told["parameters"], told["eligible"]) == (
        sum(m.size for m in held.values()),
        told["parameters"] - 2 * 16,
    )
    assert (
        told["made"]["mask_strategy"],
        told["made"]["sparsity_ratio"],
        told["made"]["seed"],
    ) == ("most_sensitive", 0.8, 4)
    assert (made / "figure.png").read_bytes().startswith(b"\x89PNG\r\n")
    page = (made / "report.html").read_text()
    assert (
        "k_proj.bias</code> in 2 layers: an attention key bias: softmax is shift-invariant" in page
    )
    assert page.count("<svg") == 1


def test_describe_tells_the_same_with_the_model_and_counts_all_without(made: Path, tmp_path: Path):
    file = made / "mask.safetensors"
    told = json.loads((made / "mask.json").read_text())
    said = run("--describe", file, "--base", VIT, "--out", tmp_path / "again").output
    assert json.loads((tmp_path / "again" / "mask.json").read_text()) == told
    assert not (tmp_path / "again" / "mask.safetensors").exists()
    assert f"{told['kept']:,} of {told['eligible']:,} eligible coordinates kept" in said
    q = [t for t in told["tensors"] if t["name"].endswith("q_proj.weight")]
    row = next(
        line.split()
        for line in said.splitlines()
        if line.startswith("encoder.layers.*.attention.q_proj.weight")
    )
    kept, eligible = sum(t["kept"] for t in q), sum(t["eligible"] for t in q)
    assert row[1:] == ["2", str(kept), str(eligible), f"{kept / eligible:.2%}"]
    alone = run("--describe", file).output
    assert f"{told['kept']:,} of {told['parameters']:,} coordinates" in alone
    assert "mask_strategy most_sensitive" in " ".join(alone.split())
    refused = run("--describe", file, "--base", vit_file(seed=1), ok=False)
    assert isinstance(refused.exception, DeltaflError)
    assert "made for another model" in str(refused.exception)


def test_query_key_and_value_of_one_tensor_are_told_apart(tmp_path: Path):
    out = tmp_path / "out"
    torch.manual_seed(0)
    run("--base", "test_cli_mask:Attention", "--data", TASK, "--sparsity-ratio", 0.5, "--mask-strategy", "random",
        "--num-clients", 3, "--participation-rate", 1, "--head", "linear", "--device", "cpu", "--out", out)  # fmt: skip
    told = json.loads((out / "mask.json").read_text())
    assert told["made"]["seed"] == 0
    rows = {t["name"]: t for t in told["tensors"]}
    held = bits(out / "mask.safetensors")
    for i, letter in enumerate("qkv"):
        for name in ("encoder.attention.in_proj_weight", "encoder.attention.in_proj_bias"):
            part = held[name][8 * i : 8 * i + 8]
            row = rows[f"{name}[{letter}]"]
            assert row["kept"] == part.sum()
            assert row["eligible"] == (0 if name.endswith("bias") and letter == "k" else part.size)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--base", VIT, "--data", TASK], "sparsity_ratio 0 freezes nothing"),
        (["--base", VIT, "--data", TASK, "--sparsity-ratio", "1"], "sparsity_ratio: must be less than 1, not 1.0"),
        (["--base", VIT, "--data", TASK, "--mask-strategy", "least_sensitve"], 'did you mean "least_sensitive"'),
        (["--data", TASK, "--sparsity-ratio", "0.5"], "model is missing"),
        (
            ["--base", VIT, "--data", TASK, "--sparsity-ratio", "0.5", "--num-clients", "9", "--participation-rate",
             "1", "--calibration-rounds", "2"],
            "2 calibration rounds of 9 fresh clients",
        ),
        (["--describe", "none.safetensors"], 'mask "none.safetensors" cannot be read'),
        (["--describe", "m", "--seed", "3"], 'unknown key "seed"; known: describe, device, model'),
    ],
)  # fmt: skip
def test_mistakes_are_told_and_nothing_is_written(
    arguments: list[str], message: str, tmp_path: Path
):
    result = run(*arguments, "--out", tmp_path / "out", ok=False)
    assert isinstance(result.exception, DeltaflError), result.exception
    assert message in str(result.exception)
    assert not list(tmp_path.iterdir())


def test_a_mask_is_kept_unless_told_otherwise(tmp_path: Path):
    given = ("--base", VIT, "--data", TASK, "--sparsity-ratio", 0.5, "--mask-strategy", "random", "--head", "linear",
             "--num-clients", 4, "--participation-rate", 0.5, "--device", "cpu", "--out", tmp_path / "out")  # fmt: skip
    run(*given)
    before = (tmp_path / "out" / "mask.safetensors").read_bytes()
    assert "--overwrite" in str(run(*given, "--seed", 1, ok=False).exception)
    assert (tmp_path / "out" / "mask.safetensors").read_bytes() == before
    run(*given, "--seed", 1, "--overwrite")
    assert (tmp_path / "out" / "mask.safetensors").read_bytes() != before
