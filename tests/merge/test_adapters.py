"""Merges of LoRA adapters: against peft's own, as models under every rule, and what is refused."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig

from checkpoint_files import load, python, refusal, save, succeed
from deltafl import TaskVector
from deltafl.algebra.low_rank import LowRank
from deltafl.merge import run
from merge.test_merge import PEAKS

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


def base_model(folder: Path, tied: bool = False, **sizes: Any):
    """A tiny Llama with random weights, and its folder."""
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES | sizes, tie_word_embeddings=tied))
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


@pytest.mark.parametrize("base", ["base", "base+b", "other"])
def test_a_mergekit_recipe_may_name_an_adapter_as_base_or_on_any_model(home: Path, base: str):
    """The model base+a, half way from another base, as mergekit makes it of the models themselves."""
    base_model(home / "other", initializer_range=0.05)
    for name in "ab":
        (home / f"whole-{name}").mkdir()
        torch.save(merged(name), home / f"whole-{name}" / "model.pt")
    recipe = {
        "merge_method": "task_arithmetic", "base_model": base,
        "models": [{"model": "base+a", "parameters": {"weight": 0.5}}],
    }  # fmt: skip
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe))
    succeed("merge", "recipe.yaml", "--out", "out", "--overwrite")
    found, tuned = load(Path("out")), torch.load(home / "whole-a" / "model.pt")
    begin = torch.load(home / "whole-b" / "model.pt") if "+" in base else load(home / base)
    assert_near(found, {name: 0.5 * (begin[name] + tuned[name]) for name in begin})
    assert not list(home.glob(".deltafl-*"))


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


def test_a_task_vector_is_the_product(home: Path) -> None:
    vector = TaskVector.from_checkpoints("base", "a")
    held, before = vector.apply_to("base"), load(home / "base")
    assert {name.split(".")[-2] for name in vector.tensors} == {*TARGETS}
    assert_near(held, merged("a"))
    assert torch.equal(held["lm_head.weight"], before["lm_head.weight"])


@pytest.mark.skipif(sys.platform != "linux", reason="other systems count memory in other ways")
def test_memory_is_bounded_by_the_block_and_not_by_the_model(tmp_path: Path) -> None:
    lines, draw = ["--version"], torch.Generator().manual_seed(0)
    for size in (64, 192):
        root, rows = tmp_path / str(size), size * 256
        save(root / "base", {"big.weight": torch.rand(rows, 1024, generator=draw)})
        for name in ("a", "b"):
            factors = {"A": torch.rand(4, 1024), "B": torch.rand(rows, 4)}
            held = {f"base_model.model.big.lora_{side}.weight": t for side, t in factors.items()}
            (root / name).mkdir()
            save_file(held, root / name / FILE)
            config = {"peft_type": "LORA", "base_model_name_or_path": str(root / "base")}
            (root / name / CONFIG).write_text(json.dumps(config))
        for method in ("task_arithmetic", "ties"):
            lines.append(
                f"merge --base {root}/base --models {root}/a {root}/b --out {root}/{method} "
                f"--method {method} --quiet --threads 2"
            )
    done = python(PEAKS, input="\n".join(lines))
    assert done.returncode == 0, done.stderr
    before, *peaks = map(int, done.stdout.splitlines()[1:])  # the first line is the version
    for small, large in zip(peaks[:2], peaks[2:], strict=True):
        assert 0 < small - before < 256 * 2**20
        assert large - small < 32 * 2**20  # a copy of one model would be 128 MB more


# As an adapter


def as_adapter(*arguments: object) -> dict[str, Tensor]:
    """The model that peft makes of base and written adapter."""
    shutil.rmtree("low", ignore_errors=True)
    succeed("merge", "--base", "base", "--out", "low", "--models", *arguments)
    base = AutoModelForCausalLM.from_pretrained("base")
    return peft.PeftModel.from_pretrained(base, "low").merge_and_unload().state_dict()


def errors() -> dict[str, float]:
    return json.loads(Path("low/deltafl.json").read_text())["adapter"]["errors"]


@pytest.mark.parametrize("rule", ["task_arithmetic", "ties"])
@pytest.mark.parametrize("rank", [1, 3, 8])
def test_an_adapter_is_the_nearest_of_its_rank_to_the_merge(
    home: Path, rule: str, rank: int
) -> None:
    how = ("a", "b", "--weights", 1, -0.5, "--method", rule, "--scaling-coef", 0.7)
    whole, theirs, before = (
        merged(*how),
        as_adapter(*how, "--as-adapter", rank),
        load(home / "base"),
    )
    told = errors()
    assert {name.split(".")[-2] for name in told} == {"q_proj", "v_proj", "down_proj"}
    for name, tensor in before.items():
        delta, low = whole[name] - tensor, theirs[name] - tensor
        if name not in told:
            assert not low.any()
            continue
        u, s, v = torch.linalg.svd(delta.double(), full_matrices=False)
        nearest = (u[:, :rank] * s[:rank]) @ v[:rank]
        assert torch.allclose(low.double(), nearest, rtol=0, atol=2e-6), name
        assert told[name] == pytest.approx(float(s[rank:].norm() / s.norm()), abs=2e-6)
    assert (max(told.values()) < 1e-6) == (rank == 8)


def test_the_product_is_never_made_where_adapters_are_summed(home, monkeypatch) -> None:
    as_adapter("a", "b", "--as-adapter", 2)
    before = load(home / "low")
    monkeypatch.setattr(LowRank, "read", lambda *_: pytest.fail("a product was made"))
    monkeypatch.setattr(run, "large_deltas", lambda _: [])
    as_adapter("a", "b", "--as-adapter", 2)
    assert load(home / "low").keys() == before.keys()


def ranks() -> dict[str, int]:
    return json.loads(Path("low/deltafl.json").read_text())["adapter"]["ranks"]


def test_a_sum_of_adapters_is_exactly_their_factors_side_by_side(home: Path) -> None:
    model = adapter(home / "c", home / "base", 1)
    adapter(home / "d", home / "base", 2, r=2, lora_alpha=6)
    model.load_adapter("d", "d")
    model.add_weighted_adapter(["default", "d"], [0.7, -0.2], "both", combination_type="cat")
    theirs = model.merge_and_unload(adapter_names=["both"]).state_dict()
    how = ("c", "d", "--weights", 0.7, -0.2, "--scaling-coef", 1)
    assert_near(as_adapter(*how, "--energy", 1), theirs)
    assert {*ranks().values()} == {3 + 2}
    assert {*errors().values()} == {0.0}
    dense = merged(*how)
    assert_near(merged("low"), dense)
    held = load_file("low/adapter_model.safetensors")
    parts = [load_file(home / name / FILE) for name in "cd"]
    for name, tensor in held.items():
        pieces = [part[name] for part in parts]
        wanted = torch.cat(pieces) if "lora_A" in name else torch.cat(pieces, 1)
        split = tensor.split([3, 2], 0 if "lora_A" in name else 1)
        for found, piece in zip(split, pieces, strict=True):
            factor = found.norm() / piece.norm()
            assert torch.allclose(found, piece * factor * (found * piece).sum().sign(), atol=1e-6)
        assert tensor.shape == wanted.shape


def test_of_adapters_with_other_targets_each_module_has_its_own_rank(home: Path) -> None:
    dense = merged("a", "b", "--server-lr", 1)
    assert_near(as_adapter("a", "b", "--energy", 1, "--server-lr", 1), dense)
    found = {module.split(".")[-1]: rank for module, rank in ranks().items()}
    assert found == {"q_proj": 5, "down_proj": 3, "v_proj": 2}
    kept = merged("a", "b", "--weights", 0, 1)
    assert_near(as_adapter("a", "b", "--energy", 1, "--weights", 0, 1), kept)
    assert {*ranks().values()} == {2}


def test_averaging_factors_apart_has_cross_terms_that_a_sum_of_products_has_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The number that docs/merging.md gives."""
    monkeypatch.chdir(tmp_path)
    base_model(tmp_path / "base", hidden_size=128, intermediate_size=128)
    model = adapter(tmp_path / "c", tmp_path / "base", 1, r=8, lora_alpha=8)
    adapter(tmp_path / "d", tmp_path / "base", 2, r=8, lora_alpha=8)
    model.load_adapter("d", "d")
    model.add_weighted_adapter(["default", "d"], [0.5, 0.5], "apart", combination_type="linear")
    theirs, before = (
        model.merge_and_unload(adapter_names=["apart"]).state_dict(),
        load(Path("base")),
    )
    wanted, ours = merged("c", "d", "--server-lr", 1), as_adapter("c", "d", "--energy", 1)
    moved = [name for name in before if "q_proj" in name or "down_proj" in name]

    def error(found: dict[str, Tensor]) -> float:
        off = torch.cat([(found[name] - wanted[name]).flatten() for name in moved])
        return float(
            off.norm() / torch.cat([(wanted[n] - before[n]).flatten() for n in moved]).norm()
        )

    assert error(theirs) == pytest.approx(1.0, abs=0.05)
    assert error(ours) < 1e-5


@pytest.mark.parametrize("energy", [0.3, 0.8, 0.95, 1.0])
def test_a_fine_tune_is_extracted_at_the_least_rank_that_keeps_the_energy(home, energy) -> None:
    before, config = load(home / "base"), json.loads(Path("base/config.json").read_text())
    names = [name for name in before if "proj" in name]
    tuned = before | {name: before[name] + 0.1 * torch.randn(before[name].shape) for name in names}
    save(home / "full", tuned, config=config)
    succeed("extract", "--base", "base", "--model", "full", "--energy", energy, "--out", "low")
    theirs = AutoModelForCausalLM.from_pretrained("base")
    theirs = peft.PeftModel.from_pretrained(theirs, "low").merge_and_unload().state_dict()
    found = ranks()
    for name in names:
        delta = (tuned[name] - before[name]).double()
        u, s, v = torch.linalg.svd(delta, full_matrices=False)
        share = s.square().cumsum(0) / s.square().sum()
        rank = found[name.removesuffix(".weight")]
        assert share[rank - 1] >= energy - 1e-9
        assert rank == 1 or share[rank - 2] < energy
        near = (u[:, :rank] * s[:rank]) @ v[:rank]
        assert torch.allclose((theirs[name] - before[name]).double(), near, rtol=0, atol=2e-6)
        assert errors()[name] == pytest.approx(
            float((1 - share[rank - 1]).clamp_min(0)) ** 0.5, abs=2e-6
        )
    assert len({*found.values()}) > 1 or energy == 1
    assert_near(merged("low"), {n: t for n, t in theirs.items() if n in before})


def test_extract_is_the_merge_of_one_and_says_what_it_cannot(home: Path) -> None:
    whole = merged("a")
    for name in ("x", "y"):
        shutil.copytree("out", name)
    both = ("--base", "base", "--out")
    succeed("extract", *both, "one", "--model", "x", "--rank", 2)
    succeed("merge", *both, "two", "--models", "y", "--as-adapter", 2)
    assert Path("one", FILE).read_bytes() == Path("two", FILE).read_bytes()
    said = succeed(
        "extract", *both, "three", "--model", "x", "--rank", 9, "--exclude", "*down*"
    ).out
    q = "model.layers.0.self_attn.q_proj.weight"
    assert f'note: "{q}" is (8, 8): its rank is at most 8' in said
    assert "adapter of rank 8: 2 matrices" in said
    part = {n: whole[n] if "q_proj" in n else t for n, t in load(home / "base").items()}
    assert_near(merged("three"), part)
    wanted = "name a rank with --rank, or how much is to be kept with --energy"
    assert refusal(home, "extract", *both, "four", "--model", "x") == wanted
    assert "energy: " in refusal(home, "extract", *both, "four", "--model", "x", "--energy", 1.5)
    assert "rank: " in refusal(home, "extract", *both, "four", "--model", "x", "--rank", 0)
    assert (
        "write:"
        in succeed("extract", *both, "four", "--model", "x", "--energy", 0.5, "--dry-run").out
    )


def test_an_adapter_of_conv1d_is_transposed(home: Path) -> None:
    config = GPT2Config(vocab_size=20, n_embd=8, n_layer=1, n_head=2, n_positions=9)
    GPT2LMHeadModel(config).save_pretrained("gpt")
    adapter(home / "one", home / "gpt", target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)
    whole = merged("one", base="gpt")
    succeed("merge", "--base", "gpt", "--models", "one", "--as-adapter", 3, "--out", "low")
    assert_near(merged("low", base="gpt"), whole, 2e-6)


def test_what_an_adapter_cannot_hold_is_refused_unless_it_is_negligible(home: Path) -> None:
    tensors = load(home / "base")
    tensors["model.layers.0.mlp.up_proj.weight"] += torch.randn(12, 8)
    config = json.loads(Path("base/config.json").read_text())
    norms = ["model.norm.weight", "model.embed_tokens.weight"]
    for by, name in ((1.0, "moved"), (1e-6, "hardly")):
        save(home / name, tensors | {n: tensors[n] + by for n in norms}, config=config)
    problem = refusal(
        home, "merge", "--base", "base", "--models", "moved", "--as-adapter", 4, "--out", "x"
    )
    assert problem.startswith(
        "--as-adapter: 1 matrices of linear layers change, and 2 other tensors"
    )
    as_adapter("moved", "--as-adapter", 4, "--exclude", *norms)
    as_adapter("hardly", "--as-adapter", 4)
    assert sorted(
        json.loads(Path("low/deltafl.json").read_text())["adapter"]["left_out"]
    ) == sorted(norms)


# What is refused


def change(folder: Path, **settings: object) -> None:
    file = folder / CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def more(folder: Path, name: str, shape: tuple[int, ...] = (20, 8)) -> None:
    held = load_file(folder / FILE)
    save_file(held | {f"base_model.model.{name}": torch.ones(shape)}, folder / FILE)


BAD = {
    "dora": (lambda f: change(f, use_dora=True), 'is more than plain LoRA ("use_dora"); merge it into its base'),
    "ia3": (lambda f: change(f, peft_type="IA3"), 'is more than plain LoRA ("IA3"); merge it'),
    "saved": (lambda f: change(f, modules_to_save=["lm_head"]), 'plain LoRA ("modules_to_save"); merge'),
    "pissa": (lambda f: change(f, init_lora_weights="pissa"), "init_lora_weights pissa, which changes the base"),
    "whole": (lambda f: more(f, "lm_head.weight"), 'is more than plain LoRA ("lm_head.weight"); merge'),
    "alone": (lambda f: more(f, "x.lora_A.weight"), 'A and B of "x" are not of one rank'),
    "ranks": (
        lambda f: more(f, "model.layers.0.self_attn.q_proj.lora_A.weight"),
        'A and B of "model.layers.0.self_attn.q_proj" are not of one rank',
    ),
    "none": (lambda f: (f / CONFIG).unlink(), f'{CONFIG}": missing, or not what peft writes'),
    "text": (lambda f: (f / CONFIG).write_text("{"), f'{CONFIG}": missing, or not what peft writes'),
    "stranger": (
        lambda f: (more(f, "x.y.lora_A.weight", (2, 8)), more(f, "x.y.lora_B.weight", (8, 2))),
        'has "x.y.weight", which the base lacks; was it fine-tuned from another base?',
    ),
    "head": (
        lambda f: (more(f, "lm_head.lora_A.weight", (2, 8)), more(f, "lm_head.lora_B.weight", (21, 2))),
        '"lm_head.weight": 21 rows, the base has 20; another vocabulary?',
    ),
    "named": (
        lambda f: change(f, base_model_name_or_path="someone/other"),
        'was fine-tuned from another base ("someone/other") than "base"',
    ),
    "recorded": (
        lambda f: (f / "training.json").write_text('{"base": {"id": "x", "fingerprint": "y"}}'),
        "was fine-tuned from another base",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("spoil", "told"), BAD.values(), ids=BAD)
def test_what_is_no_plain_adapter_of_this_base_is_one_line(home: Path, spoil, told: str) -> None:
    spoil(home / "a")
    problem = refusal(home, "merge", "--base", "base", "--models", "a", "b", "--out", "x")
    assert told in problem


def test_the_base_is_known_by_its_values_and_else_by_its_name(home: Path) -> None:
    shutil.copytree("base", "copy/base")
    shutil.copytree("base", "elsewhere")
    base_model(home / "other" / "base", tied=True)
    whole = merged("a")
    assert_near(merged("a", base="copy/base"), whole, 0)
    change(home / "a", base_model_name_or_path="owner/base")
    assert_near(merged("a"), whole, 0)
    asked = ("merge", "--models", "a", "--out", "x", "--base", "elsewhere")
    assert 'another base ("owner/base") than "elsewhere"' in refusal(home, *asked)
    assert_near(merged("elsewhere+a", base="elsewhere"), whole, 0)
    succeed(*asked, "--allow-other-base")
    assert 'another base ("other/base")' in refusal(
        home, *asked[:2], "other/base+a", *asked[3:], "--overwrite"
    )


def test_an_adapter_is_no_base_and_a_model_no_adapter(home: Path) -> None:
    asked = ("merge", "--out", "x", "--base")
    problem = refusal(home, *asked, "a", "--models", "b")
    assert problem.startswith('base "a" is an adapter; make it a model: deltafl merge --base ')
    assert refusal(home, *asked, "base", "--models", "base+base").endswith(
        '"base" is a model and no adapter'
    )


def test_an_adapter_of_a_tied_head_is_refused(home: Path) -> None:
    base_model(home / "tied", tied=True)
    adapter(home / "one", home / "base", target_modules=["lm_head"])
    problem = refusal(home, "merge", "--base", "tied", "--models", "tied+one", "--out", "x")
    assert 'has "lm_head.weight", which the base lacks' in problem


# Text


def test_another_chat_template_is_said_and_can_be_chosen(home: Path) -> None:
    files = {
        "base": {"eos_token": "</s>"},
        "a": {"eos_token": {"content": "</s>"}, "chat_template": "x"},
    }
    for name, config in files.items():
        (home / name / "tokenizer_config.json").write_text(json.dumps(config))
    (home / "b" / "tokenizer_config.json").write_text('{"eos_token": "<e>"}')
    (home / "b" / "generation_config.json").write_text('{"temperature": 2}')
    asked = ("merge", "--base", "base", "--models", "a", "b", "--out", "out", "--overwrite")
    told = [line for line in succeed(*asked).err.splitlines() if "tokenizer-from" in line]
    assert told == [
        'warning: model "a": not the chat template of the base, which is written; choose with --tokenizer-from a',
        'warning: model "b": not the special tokens and generation config of the base, which is written; '
        "choose with --tokenizer-from b",
    ]
    written = lambda name: json.loads(Path("out", f"{name}.json").read_text())  # noqa: E731
    assert written("tokenizer_config") == files["base"]
    for chosen in ("a", str(home / "a")):
        models = [chosen, "b"]
        again = (*asked[:4], *models, *asked[6:])
        assert "tokenizer-from" not in succeed(*again, "--tokenizer-from", chosen).err
        assert written("tokenizer_config") == files["a"]
        assert written("config") == json.loads(Path("base/config.json").read_text())
    problem = refusal(home, *asked, "--tokenizer-from", "c")
    assert problem == '--tokenizer-from "c" is no model of this merge; known: a, b'
