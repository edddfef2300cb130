"""Merges of LoRA adapters: against peft's own, as models under every rule, and what is refused."""

import shutil
from pathlib import Path

import peft
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig

from checkpoint_files import load, succeed

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing`:FutureWarning"
)  # peft's

SIZES = {
    "vocab_size": 20,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
TARGETS = ["q_proj", "down_proj"]
FILE, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def base_model(folder: Path, tied: bool = False):
    """A tiny Llama with random weights, and its folder."""
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES, tie_word_embeddings=tied))
    made.save_pretrained(folder)
    return made


def adapter(folder: Path, base: Path, seed: int = 1, **settings):
    """peft's model with an adapter of random weights, as peft saves it."""
    made = AutoModelForCausalLM.from_pretrained(base)
    config = peft.LoraConfig(**{"r": 3, "lora_alpha": 5, "target_modules": TARGETS, **settings})
    torch.manual_seed(seed)
    model = peft.get_peft_model(made, config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.1)
    model.save_pretrained(folder, save_embedding_layers=False)
    return model


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a base and two adapters of it, of other targets."""
    base_model(tmp_path / "base")
    adapter(tmp_path / "a", tmp_path / "base", 1)
    adapter(tmp_path / "b", tmp_path / "base", 2, r=2, target_modules=["q_proj", "v_proj"])
    monkeypatch.chdir(tmp_path)
    return tmp_path


def merged(*arguments: object, base: str = "base") -> dict[str, Tensor]:
    shutil.rmtree("out", ignore_errors=True)
    succeed("merge", "--base", base, "--out", "out", "--models", *arguments)
    return load(Path("out"))


def assert_near(ours: dict[str, Tensor], theirs: dict[str, Tensor], by: float = 1e-6) -> None:
    assert ours.keys() <= theirs.keys()
    for name, tensor in ours.items():
        assert torch.allclose(tensor, theirs[name], rtol=0, atol=by), name


VARIANTS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {
        "rank_pattern": {"layers.0.mlp.down_proj": 5},
        "alpha_pattern": {"^model.layers.1.*q_proj": 7},
    },
    "embedding": {"target_modules": ["embed_tokens", "v_proj"]},
}


@pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS)
def test_a_merge_of_one_equals_merge_and_unload(home: Path, settings) -> None:
    model = adapter(home / "one", home / "base", **settings)
    before = load(home / "base")
    theirs = model.merge_and_unload().state_dict()
    assert any(not torch.equal(theirs[name], tensor) for name, tensor in before.items())
    assert_near(merged("one"), theirs)
    assert_near(merged("base+one"), theirs)


def test_conv1d_of_gpt2_is_transposed(home: Path) -> None:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=20, n_embd=8, n_layer=1, n_head=2, n_positions=9)
    GPT2LMHeadModel(config).save_pretrained("gpt")
    model = adapter(
        home / "one", home / "gpt", target_modules=["c_attn", "c_proj"], fan_in_fan_out=True
    )
    assert_near(merged("one", base="gpt"), model.merge_and_unload().state_dict())


def test_a_weighted_merge_equals_the_combination_cat_of_peft(home: Path) -> None:
    model = adapter(home / "c", home / "base", 1)
    adapter(home / "d", home / "base", 2, r=2)
    model.load_adapter("d", "d")
    model.add_weighted_adapter(["default", "d"], [0.7, -0.2], "both", combination_type="cat")
    theirs = model.merge_and_unload(adapter_names=["both"]).state_dict()
    scale = ("--weights", 0.7, -0.2, "--scaling-coef", 1)
    assert_near(merged("c", "d", *scale), theirs)


@pytest.mark.parametrize("method", ["ties", "knots", "wudi", "cclip", "median", "krum"])
def test_every_rule_makes_of_adapters_what_it_makes_of_whole_models(
    home: Path, method: str
) -> None:
    names = ["a", "b", "c"]
    adapter(home / "c", home / "base", 3)
    for name in names:
        model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("base"), name)
        model.merge_and_unload().save_pretrained(home / "whole" / name)
    how = ("--method", method, *(("--rho", 0.5) if method == "cclip" else ()))
    some = ("--include", "*q_proj*", "*down_proj*", "*v_proj*")  # ties trims to a share of all
    whole = merged(*(f"whole/{name}" for name in names), *how, *some)
    assert_near(merged(*names, *how), whole, 2e-6)
    how = (*how, *some)
    assert_near(merged("a", "whole/b", "base+c", *how), whole, 2e-6)
