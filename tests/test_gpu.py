"""The same on a GPU as on a CPU: merges to rounding, training and scores nearly so."""

import json
from pathlib import Path

import pytest
import torch

from checkpoint_files import load, make_world, succeed
from deltafl.rules.building import delta_rules, load_rules
from tiny_models import tiny_llama

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


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama, and beside it questions that it can learn to answer."""
    root = tmp_path_factory.mktemp("language")
    (root / "base").mkdir()
    tiny_llama(root / "base").save(root / "base")
    for name, text, answer in (("sums", "{} and 1?", "#### 7"), ("days", "day {}?", "#### 3")):
        for split, count in (("train", 60), ("test", 12)):
            rows = [{"prompt": text.format(i % 9), "response": answer} for i in range(count)]
            (root / f"{name}_{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return root / "base"


LEARN = ("--batch-size", 12, "--steps", 30, "--lr", 0.01, "--quiet")


@pytest.mark.parametrize("more", [(), ("--lora-rank", 4)], ids=["whole", "lora"])
def test_language_models_learn_and_write(llama: Path, tmp_path: Path, more: tuple) -> None:
    data, found = ("--data", "sums", "--data-dir", llama.parent), dict[tuple[str, str], float]()
    for device in ("cpu", "cuda"):
        told = (*data, "--device", device)
        succeed("finetune", "--base", llama, *told, *LEARN, *more, "--out", tmp_path / device)
        for score in ("likelihood", "exact"):
            file = tmp_path / f"{device}-{score}.json"
            how = ("--score", score, "--max-new-tokens", 8, "--json", file)
            succeed("evaluate", "--models", tmp_path / "cpu", *told, *how)
            found[device, score] = json.loads(file.read_text())["results"][0]["score"]
    assert found["cpu", "likelihood"] == pytest.approx(found["cuda", "likelihood"], abs=1e-4)
    assert found["cpu", "exact"] == found["cuda", "exact"]
    assert more or found["cpu", "exact"] == 1
    close(tmp_path / "cpu", tmp_path / "cuda", rtol=5e-2, atol=5e-3)


def test_language_suites(llama: Path, tmp_path: Path) -> None:
    study = {
        "tasks": ["sums", "days"], "lr_values": [0.01], "steps_values": [30], "scaling_coefs": [0.3, 0.6],
        "methods": ["ties", "wudi", "regmean", "sequential_regression"], "examples_values": [4],
        "written": {"sums": "exact"}, "written_limit": 6,
    }  # fmt: skip
    data = {"data": "", "data_dir": str(llama.parent), "max_new_tokens": 8}
    config = tmp_path / "study.yaml"
    config.write_text(json.dumps({"model": str(llama), "data": data, "study": study}))
    told = ("--config", config, "--batch-size", 12, "--device", "cuda", "--out", tmp_path / "out")
    said = succeed("suite", "language", *told).out
    assert "sums, exact match" in said
