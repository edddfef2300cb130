"""A Llama-shaped bf16 base and four fine-tunes of it with random weights, made block by block."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

NUM_MODELS = 4
HIDDEN, INTERMEDIATE, LAYERS, VOCABULARY = 1536, 4096, 14, 32000
BLOCK = 1 << 22
BASE_STD, DELTA_STD = 0.02, 1e-3


def config(scale: float) -> dict[str, object]:
    """LlamaConfig of about half a billion parameters times `scale`."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": int(LAYERS * scale),
        "num_attention_heads": HIDDEN // 128,
        "num_key_value_heads": HIDDEN // 128,
        "vocab_size": int(VOCABULARY * scale),
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def shapes(scale: float) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every tensor, in the order of the file."""
    yield "lm_head.weight", (int(VOCABULARY * scale), HIDDEN)
    yield "model.embed_tokens.weight", (int(VOCABULARY * scale), HIDDEN)
    for layer in range(int(LAYERS * scale)):
        prefix = f"model.layers.{layer}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield f"{prefix}.{norm}.weight", (HIDDEN,)
        for part in ("gate", "up"):
            yield f"{prefix}.mlp.{part}_proj.weight", (INTERMEDIATE, HIDDEN)
        yield f"{prefix}.mlp.down_proj.weight", (HIDDEN, INTERMEDIATE)
        for part in "qkvo":
            yield f"{prefix}.self_attn.{part}_proj.weight", (HIDDEN, HIDDEN)
    yield "model.norm.weight", (HIDDEN,)


def header(scale: float) -> tuple[bytes, int]:
    """The header of the safetensors file with its length in front, and the number of elements behind it."""
    held: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, shape in shapes(scale):
        size = 2 * int(np.prod(shape))
        held[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    raw = json.dumps(held, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw, at // 2


def to_bf16(values: np.ndarray) -> np.ndarray:
    """Finite float32 -> the uint16 of bfloat16, nearest, ties to even."""
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def make_models(folder: Path, scale: float) -> tuple[Path, list[Path]]:
    """The folders of the base and the fine-tunes, made unless they are there."""
    base = folder / f"base-{scale:g}"
    tuned = [folder / f"tuned-{scale:g}-{i}" for i in range(NUM_MODELS)]
    if not all((f / "done").exists() for f in (base, *tuned)):
        for model in (base, *tuned):
            _companions(model, scale)
        _weights([base, *tuned], scale)
        for model in (base, *tuned):
            (model / "done").touch()
    return base, tuned


def _companions(folder: Path, scale: float) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2} | {
        f"t{i}": i for i in range(3, int(VOCABULARY * scale))
    }
    tokenizer = {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": {"type": "Whitespace"},
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<unk>"},
    }
    named = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "config.json").write_text(json.dumps(config(scale), indent=2))
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **named})
    )


def _weights(folders: list[Path], scale: float) -> None:
    """Base: normal; fine-tunes: the rounded base plus a normal delta of their own."""
    head, numel = header(scale)
    streams = [(f / "model.safetensors").open("wb") for f in folders]
    draws = [np.random.default_rng(i) for i in range(len(folders))]
    try:
        for stream in streams:
            stream.write(head)
        for start in range(0, numel, BLOCK):
            count = min(BLOCK, numel - start)
            bits = to_bf16(draws[0].standard_normal(count, np.float32) * np.float32(BASE_STD))
            streams[0].write(bits.tobytes())
            base = (bits.astype(np.uint32) << 16).view(np.float32)
            for stream, draw in zip(streams[1:], draws[1:], strict=True):
                delta = draw.standard_normal(count, np.float32) * np.float32(DELTA_STD)
                stream.write(to_bf16(base + delta).tobytes())
    finally:
        for stream in streams:
            stream.close()
