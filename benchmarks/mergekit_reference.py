"""Make tests/fixtures/mergekit.safetensors: a tiny Llama, three fine-tunes, and what mergekit 0.1.5 merges them to.

Each model is one vector, its tensors in the order of the metadata's shapes.

python benchmarks/mergekit_reference.py path/to/mergekit-yaml tests/fixtures/mergekit.safetensors

Values lie on a grid of 2^-12, so that differences are exact; in one tensor no two magnitudes of a delta are equal,
since mergekit keeps one of equal ones by chance; some deltas cancel exactly.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

HIDDEN, VOCABULARY, LAYERS, SEED = 8, 12, 3, 0
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN, "intermediate_size": HIDDEN,
    "num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": LAYERS, "vocab_size": VOCABULARY,
    "max_position_embeddings": 16, "tie_word_embeddings": False, "torch_dtype": "float32",
}  # fmt: skip
FLAGS = ["--no-copy-tokenizer", "--no-write-model-card", "--quiet", "--no-cuda"]


def models(*parameters: dict[str, Any] | None) -> list[dict[str, Any]]:
    return [
        {"model": f"m{i}", **({"parameters": p} if p is not None else {})}
        for i, p in enumerate(parameters)
    ]


def sources(start: int, stop: int, *weights: Any) -> list[dict[str, Any]]:
    found = [{"model": "base", "layer_range": [start, stop]}]
    for i, weight in enumerate(weights):
        found.append(
            {"model": f"m{i}", "layer_range": [start, stop], "parameters": {"weight": weight}}
        )
    return found


CONFIGS: dict[str, dict[str, Any]] = {
    "linear": {"merge_method": "linear", "models": models({"weight": 1.0}, {"weight": [0.2, 1.0]}, {"weight": 0.5})},
    "linear, sum 1": {
        "merge_method": "linear", "models": models({"weight": 0.3}, {"weight": 0.5}, {"weight": 0.2}),
        "parameters": {"normalize": False}, "dtype": "float32",
    },
    "task_arithmetic": {
        "merge_method": "task_arithmetic", "base_model": "base",
        "models": [
            {"model": "base"},
            *models(
                {"weight": [0.0, 0.5, 1.0]},
                {"weight": [{"filter": "mlp", "value": [0.9, 0.1]}, {"filter": "norm", "value": 0.0}, {"value": 0.4}]},
                None,
            ),
        ],
        "parameters": {"lambda": 0.7, "weight": [{"filter": "self_attn", "value": -0.3}, {"value": 0.2}]},
    },
    "task_arithmetic, normalized": {
        "merge_method": "task_arithmetic", "base_model": "base",
        "models": models({"weight": 1.0}, {"weight": -0.25}, {"weight": 0.5}), "parameters": {"normalize": True},
    },
    "ties": {
        "merge_method": "ties", "base_model": "base", "parameters": {"lambda": 0.9},
        "models": models(
            {"weight": 0.5, "density": 0.3}, {"weight": 0.8, "density": 0.61}, {"weight": 0.2, "density": 1.0}
        ),
    },
    "ties, gradients": {
        "merge_method": "ties", "base_model": "base",
        "parameters": {"lambda": [0.5, 1.5], "density": [0.2, 0.9, 0.4], "weight": 1.0},
        "models": models({"weight": [0.1, 0.9]}, {"density": [{"filter": "q_proj", "value": 0.05}]}, None),
    },
    "ties, sum": {
        "merge_method": "ties", "base_model": "base", "parameters": {"normalize": False, "int8_mask": True},
        "models": models(
            {"weight": -0.5, "density": [{"filter": "mlp", "value": 0.2}, {"filter": "*", "value": 0.7}]},
            {"weight": 0.8, "density": 0.0}, {"weight": 0.6, "density": 0.5},
        ),
    },
    "ties, cancelling": {
        "merge_method": "ties", "base_model": "base", "models": models(None, None, {"weight": 0.0}),
        "parameters": {"weight": 1.0},
    },
    "dare_linear, density 1": {
        "merge_method": "dare_linear", "base_model": "base", "parameters": {"lambda": [0.5, 1.0], "density": 1.0},
        "models": models({"weight": 0.5}, {"weight": 0.25}, {"weight": -0.3}),
    },
    "dare_ties, density 1": {
        "merge_method": "dare_ties", "base_model": "base", "parameters": {"normalize": True, "rescale": True},
        "models": models({"weight": 0.5}, {"weight": [0.25, 1.0]}, {"weight": 0.3}),
    },
    "slices": {
        "merge_method": "task_arithmetic", "base_model": "base",
        "slices": [
            {"sources": sources(0, 2, 0.3, [0.2, 0.8], 0.1), "parameters": {"lambda": 0.5}},
            {"sources": sources(2, 3, [0.0, 0.6], 0.5, 0.9)},
        ],
    },
}  # fmt: skip
"""Name -> configuration; models are the folders base, m0, m1 and m2."""


def shapes() -> dict[str, tuple[int, ...]]:
    square, half = (HIDDEN, HIDDEN), (HIDDEN // 2, HIDDEN)
    layer = {"self_attn.q_proj": square, "self_attn.k_proj": half, "self_attn.v_proj": half, "self_attn.o_proj": square,
             "mlp.gate_proj": square, "mlp.up_proj": square, "mlp.down_proj": square, "input_layernorm": (HIDDEN,),
             "post_attention_layernorm": (HIDDEN,)}  # fmt: skip
    outside = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN), "model.norm.weight": (HIDDEN,),
               "lm_head.weight": (VOCABULARY, HIDDEN)}  # fmt: skip
    return outside | {
        f"model.layers.{i}.{name}.weight": s for i in range(LAYERS) for name, s in layer.items()
    }


def inputs() -> dict[str, dict[str, np.ndarray]]:
    """Folder -> tensors, of the base and the fine-tunes."""
    draw = np.random.default_rng(SEED)
    made: dict[str, dict[str, np.ndarray]] = {name: {} for name in ("base", "m0", "m1", "m2")}
    for name, shape in shapes().items():
        size = int(np.prod(shape))
        made["base"][name] = (
            (draw.integers(-4096, 4096, size) / 4096).astype(np.float32).reshape(shape)
        )
        deltas = [
            draw.permutation(1024)[:size] * draw.choice([-1, 1], size) + 0.0 for _ in range(3)
        ]
        magnitudes = np.abs(deltas[0]) + 1
        deltas[1] = np.where(
            np.arange(size) % 4 == 0, -np.sign(deltas[0]) * magnitudes, 2048 + np.abs(deltas[1])
        )
        deltas[0] = np.sign(deltas[0]) * magnitudes
        for i, delta in enumerate(deltas):
            made[f"m{i}"][name] = (made["base"][name] + delta.reshape(shape) / 4096).astype(
                np.float32
            )
    return made


def write_models(folder: Path, tensors: Mapping[str, Mapping[str, np.ndarray]]) -> None:
    """A Hugging Face directory for each model."""
    for name, held in tensors.items():
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(CONFIG))
        save_file(dict(held), folder / name / "model.safetensors", metadata={"format": "pt"})


def merged(program: str, folder: Path, config: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """What mergekit makes of a configuration, run in the folder that holds the models; JSON is YAML."""
    (folder / "config.yaml").write_text(json.dumps(config))
    with tempfile.TemporaryDirectory() as out:
        subprocess.run(
            [program, "config.yaml", out, *FLAGS], cwd=folder, check=True, capture_output=True
        )
        return load_file(Path(out) / "model.safetensors")


def main(program: str, target: str) -> None:
    made = inputs()
    with tempfile.TemporaryDirectory() as folder:
        write_models(Path(folder), made)
        made |= {
            f"out {name}": merged(program, Path(folder), config) for name, config in CONFIGS.items()
        }
    order = shapes()
    flat = {
        name: np.concatenate([held[tensor].ravel() for tensor in order])
        for name, held in made.items()
    }
    save_file(flat, target, metadata={"configs": json.dumps(CONFIGS), "shapes": json.dumps(order)})


if __name__ == "__main__":
    main(*sys.argv[1:])
