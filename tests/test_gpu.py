"""The same on a GPU as on a CPU: merges to rounding, training and scores nearly so."""

from pathlib import Path

import pytest
import torch

from checkpoint_files import load, make_world, succeed
from deltafl.rules.rule import delta_rules, load_rules

pytestmark = pytest.mark.gpu

FACTS = ("--num-steps", "100", "200", "300", "400", "500")
FACTS = (*FACTS, "--num-examples", "10", "20", "30", "40", "50")
DIGITS = ("--data", "digits:mirrored", "--limit", "60")


def options(method: str) -> list[str]:
    """Parameters that a merge by the rule needs."""
    found: list[str] = []
    for key, value in load_rules()[method].typical().items():
        found += [f"--{key.replace('_', '-')}", str(value)]
    return found


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small ViT with a head, and two fine-tunes of it, made on the CPU."""
    root = tmp_path_factory.mktemp("gpu")
    config = root / "config.json"
    config.write_text(
        '{"model_type": "vit", "hidden_size": 32, "num_hidden_layers": 2, "image_size": 16,'
        ' "num_attention_heads": 2, "intermediate_size": 64, "patch_size": 4, "num_channels": 1}'
    )
    train(config, root / "base", "cpu", "--steps", 0)
    for seed in (1, 2):
        head = root / "base" / "head.safetensors"
        train(root / "base", root / f"tuned-{seed}", "cpu", "--seed", seed, "--head", head)
    return root / "base"


def train(model: Path, out: Path, device: str, *more: object) -> Path:
    steps = () if "--steps" in more else ("--steps", 6)
    shared = (*DIGITS, "--batch-size", 16, "--lr", 1e-3, "--device", device, "--quiet")
    succeed("finetune", "--base", model, *shared, *steps, *more, "--out", out)
    return out


def close(a: Path, b: Path, **how: float) -> None:
    ours, theirs = load(a), load(b)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], **how, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("method", list(delta_rules()))
def test_merges(method: str, tmp_path: Path) -> None:
    world = make_world(tmp_path, 5)
    for device in ("cpu", "cuda"):
        more = (*options(method), *FACTS, "--device", device, "--quiet")
        succeed(*world.args[:-2], "--method", method, *more, "--out", tmp_path / device)
    close(tmp_path / "cpu", tmp_path / "cuda", rtol=1e-5, atol=1e-7)


def test_fine_tuning_and_evaluation(base: Path, tmp_path: Path) -> None:
    for device in ("cpu", "cuda"):
        train(base, tmp_path / device, device, "--head", base / "head.safetensors")
        told = ("--device", device, "--json", tmp_path / f"{device}.json")
        succeed("evaluate", "--models", tmp_path / device, *DIGITS, *told)
    close(tmp_path / "cpu", tmp_path / "cuda", rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize(
    "more",
    [
        (),
        ("--sparsity-ratio", "0.5", "--mask-scope", "per_layer"),
        ("--local-algorithm", "scaffold", "--momentum", "0"),
        ("--server-optimizer", "fedadam", "--server-lr", "0.01", "--augment", "crop_flip"),
        ("--aggregator", "cclip", "--rho", "1"),
    ],
    ids=lambda more: " ".join(more[:2]) or "plain",
)
def test_federated_rounds(base: Path, tmp_path: Path, more: tuple[str, ...]) -> None:
    shared = ("--num-clients", 4, "--participation-rate", 1, "--num-rounds", 3, "--batch-size", 8)
    for device in ("cpu", "cuda"):
        told = (*DIGITS, *shared, *more, "--device", device, "--quiet", "--out", tmp_path / device)
        succeed("federate", "--model", base, *told)
    close(tmp_path / "cpu" / "model", tmp_path / "cuda" / "model", rtol=5e-2, atol=5e-3)


def test_searches(base: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "search.yaml"
    models = "".join(
        f"  - {{path: {base.parent / f'tuned-{i}'}, data: '{data}'}}\n"
        for i, data in ((1, "digits:mirrored"), (2, "digits:thick"))
    )
    recipe.write_text(
        f"base: {base}\nmodels:\n{models}methods: [task_arithmetic, ties, cclip, median]\n"
        "scaling_coefs: [0.5, 1.0]\nstrategy: racing\nmetric: absolute\n"
    )
    out = succeed("search", recipe, "--device", "cuda", "--out", tmp_path / "out")
    assert "task_arithmetic" in out.out


def test_masks(base: Path, tmp_path: Path) -> None:
    shared = ("--num-clients", 4, "--participation-rate", 1, "--sparsity-ratio", 0.5)
    told = (*DIGITS, *shared, "--fisher-labels", "empirical", "--device", "cuda")
    succeed("mask", "--model", base, *told, "--out", tmp_path / "mask")
    succeed("mask", "--describe", tmp_path / "mask/mask.safetensors", "--base", base)
