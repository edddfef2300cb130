"""What people ran into and reported in public, here and with other tools: one small case of each kind."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor, nn

from checkpoint_files import load, refusal, save, succeed
from deltafl.algebra.aggregate import Stepped
from deltafl.algebra.deltas import Difference, Update
from deltafl.merge.inputs import open_updates
from deltafl.merge.plan import plan_merge
from deltafl.merge.recipe import MergeRecipe
from deltafl.rules.building import delta_rules
from deltafl.rules.rule import Source

BLOCK = "model.layers.0"
NORM = f"{BLOCK}.input_layernorm.weight"


def state(seed: int = 0, scale: float = 0.01) -> dict[str, Tensor]:
    """A Llama-like model; with a seed a fine-tune of that without."""
    shapes = {
        "model.embed_tokens.weight": (12, 8),
        f"{BLOCK}.self_attn.q_proj.weight": (8, 8),
        f"{BLOCK}.mlp.up_proj.weight": (16, 8),
        NORM: (8,),
    }
    start, noise = torch.Generator().manual_seed(0), torch.Generator().manual_seed(seed)
    base = {name: torch.randn(shape, generator=start) for name, shape in shapes.items()}
    moved = {n: t + scale * torch.randn(t.shape, generator=noise) for n, t in base.items()}
    return moved if seed else base


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "base", state())
    for seed, name in enumerate("ab", 1):
        save(tmp_path / name, state(seed))
    return tmp_path


def asked(*more: object, models: str = "a b") -> list[object]:
    return ["merge", "--base", "base", "--models", *models.split(), "--out", "out", *more]


def mean(*seeds: int) -> dict[str, Tensor]:
    return {n: torch.stack([state(s)[n] for s in seeds]).mean(0) for n in state()}


def assert_near(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-6, equal_nan=True)


# Buffers

BUFFERS = {
    f"{BLOCK}.self_attn.rotary_emb.inv_freq": (4,),
    f"{BLOCK}.self_attn.rotary_emb.cos_cached": (1, 1, 9, 4),
    "transformer.h.0.attn.bias": (1, 1, 9, 9),
    "transformer.h.0.attn.masked_bias": (),
    "gpt_neox.layers.0.attention.bias": (1, 1, 9, 9),
}


@pytest.mark.parametrize("name", BUFFERS)
def test_buffers_are_computed_and_not_merged_whoever_holds_them(home: Path, name: str) -> None:
    held = {name: torch.rand(BUFFERS[name])}
    save(home / "old", state(3) | held)
    said = succeed(*asked(models="a old")).out
    assert 'not used of "old": 1 tensors (computed, not trained)' in said
    assert_near(load(home / "out"), mean(1, 3))
    save(home / "first", state() | held)
    said = succeed("merge", "--base", "first", "--models", "a", "old", "--out", "back").out
    assert "copied from the base: 1 tensors (computed, not trained)" in said
    assert_near(load(home / "back"), mean(1, 3) | held)


def test_a_bias_of_attention_is_no_mask(home: Path) -> None:
    name = "transformer.h.0.attn.bias"
    save(home / "old", state(3) | {name: torch.ones(8)})
    problem = refusal(home, *asked(models="old"))
    assert problem.startswith(f'model "old": has "{name}", which the base lacks')
    assert problem.endswith("Leave them out with --exclude if not")


def test_exclude_reaches_what_only_a_model_holds_and_its_own_names(home: Path) -> None:
    save(
        home / "more", {f"net.{n}": t for n, t in state(3).items()} | {"net.extra.x": torch.ones(2)}
    )
    assert "extra" in refusal(home, *asked(models="a more"))
    said = succeed(*asked("--exclude", "net.extra.*", "net.*_layernorm.*", models="a more"))
    assert 'not used of "more": 1 tensors (left out by --include/--exclude)' in said.out
    assert_near(load(home / "out"), mean(1, 3) | {NORM: state()[NORM]})
    problem = refusal(home, *asked("--exclude", "net.extra.*", "--overwrite"))
    assert problem.startswith('pattern "net.extra.*" matches no tensor of the base')


# Running statistics of a batch norm

VARIANCES, SEEN = (1.0, 0.2, 0.4), (0, 100, 300)


@pytest.fixture
def norms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A base and two fine-tunes whose variances are a fifth and two fifths of its own."""
    monkeypatch.chdir(tmp_path)
    for name, variance, seen in zip("bxy", VARIANCES, SEEN, strict=True):
        held = {
            "norm.weight": torch.full((4,), variance),
            "norm.bias": torch.zeros(4),
            "norm.running_mean": torch.full((4,), -variance),
            "norm.running_var": torch.full((4,), variance),
            "norm.num_batches_tracked": torch.tensor(seen),
        }
        torch.save(held, f"{name}.pt")
    return tmp_path


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ("--scaling-coef 1", 0.3),
        ("--scaling-coef 2 --weights 3 1", 0.25),
        ("--scaling-coef 1 --weights -3 1", 0.25),
        ("--server-lr 0.5", 0.65),
        ("--server-lr 0", 1.0),
        ("--server-lr -1", 1.0),
        ("--method dare --drop-rate 0.5 --scaling-coef 1", 0.3),
        ("--method ties --scaling-coef 3", 0.3),
        ("--method wudi --scaling-coef 3", 0.3),
    ],
)
def test_running_statistics_are_averaged_and_never_extrapolated(norms, options, wanted) -> None:
    out = norms / "out"
    called = ("merge", "--base", "b.pt", "--models", "x.pt", "y.pt", "--out", out)
    said = succeed(*called, *options.split()).out
    assert "note: 2 running statistics are averaged, never extrapolated" in said
    merged = load(out)
    for name, sign in (("norm.running_var", 1), ("norm.running_mean", -1)):
        torch.testing.assert_close(merged[name], torch.full((4,), sign * wanted))
    norm = nn.BatchNorm1d(4).eval()
    norm.load_state_dict({n.removeprefix("norm."): t for n, t in merged.items()})
    assert norm(torch.randn(3, 4)).isfinite().all()
    assert int(merged["norm.num_batches_tracked"]) == SEEN[0]


@pytest.mark.parametrize("method", ["task_arithmetic", "median", "tsv_m"])
def test_a_search_steps_as_a_merge_does(norms: Path, method: str) -> None:
    given = {"base": "b.pt", "models": ["x.pt", "y.pt"], "method": method, "scaling_coef": 1.0}
    plan = plan_merge(MergeRecipe.of(**given))
    opened = open_updates(plan)
    stepped = Stepped(opened.base, opened.aggregate(plan.rule), 2.0)
    succeed("merge", "--base", "b.pt", "--models", "x.pt", "y.pt", "--out", "out", "--method", method,
            "--server-lr", 2)  # fmt: skip
    assert_near(dict(stepped), load(norms / "out"))


# NaN

PROJECTION = f"{BLOCK}.mlp.up_proj.weight"


def broken(seed: int, value: float = torch.nan) -> dict[str, Tensor]:
    held = state(seed)
    held[PROJECTION][3, 4] = value
    return held


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("method", ["task_arithmetic", "median", "krum"])
def test_what_is_not_finite_in_the_base_is_the_bases(home: Path, method: str, value: float) -> None:
    save_file(broken(0, value), home / "base/model.safetensors")
    save(home / "c", state(3))
    problem = refusal(home, *asked("--method", method, models="a b c"))
    assert problem.startswith(f'the base: tensor "{PROJECTION}" holds NaN or Inf (element 28); ')
    succeed(*asked("--method", method, "--exclude", PROJECTION, models="a b c"))


PARAMS = {
    "cclip": {"rho": 0.5}, "dare": {"drop_rate": 0.5}, "fedgma": {"rho": 0.6},
    "della": {"density": 1}, "breadcrumbs": {"density": 0.5},
}  # fmt: skip


@pytest.mark.parametrize("method", list(delta_rules()))
def test_a_model_of_weight_0_is_left_out_whatever_it_holds(home: Path, method: str) -> None:
    save(home / "bad", broken(3))
    save(home / "c", state(4))
    options = [f"--{k.replace('_', '-')}={v}" for k, v in PARAMS.get(method, {}).items()]
    told = [f"--{key.replace('_', '-')}" for key in ("num_steps", "num_examples")]
    for models, weights in (("a b c", "1 2 1"), ("a b c bad", "1 2 1 0")):
        numbers = [n for option in told for n in (option, *(5 for _ in models.split()))]
        called = asked(
            "--method", method, *options, *numbers, "--weights", *weights.split(), models=models
        )
        succeed(*called, "--overwrite")
        found, wanted = load(home / "out"), found if "bad" in models else load(home / "out")  # noqa: F821
    assert_near(found, wanted)


def test_a_delta_of_weight_0_is_not_read_in_an_adapter_either(home: Path) -> None:
    save(home / "bad", broken(3))
    exclude = ("--exclude", "*norm*", "*embed*")
    for out, models, weights in (("one", "a b", (1, 1)), ("two", "a b bad", (1, 1, 0))):
        succeed(
            *asked(*exclude, "--weights", *weights, "--as-adapter", 8, "--out", out, models=models)
        )
    assert_near(load(home / "two"), load(home / "one"))


def test_the_base_of_a_difference_is_its_own() -> None:
    base, tuned = {"w": torch.ones(2)}, {"w": torch.tensor([torch.nan, 1.0])}
    assert torch.equal(
        Update(Difference(base, tuned), Source("a")).delta["w"].isnan(), torch.tensor([True, False])
    )


# Dtypes


@pytest.mark.parametrize(
    ("options", "written"),
    [
        ("--dtype float32", "F32"),
        ("", "BF16"),
        ("--dtype float16", "F16"),
        ("--as-adapter 2", "F32"),
    ],
)
def test_a_note_names_the_dtype_that_is_written(home: Path, options: str, written: str) -> None:
    save(home / "low", {name: tensor.bfloat16() for name, tensor in state().items()})
    called = (
        "merge",
        "--base",
        "low",
        "--models",
        "a",
        "--out",
        "out",
        "--exclude",
        "*norm*",
        "*embed*",
    )
    said = succeed(*called, *options.split()).out
    assert f'note: model "a": 2 tensors are F32, the base is BF16: the result is {written}' in said
    assert {str(t.dtype) for n, t in load(home / "out").items() if "proj" in n} == {
        {"F32": "torch.float32", "BF16": "torch.bfloat16", "F16": "torch.float16"}[written]
    }


# Text


def test_a_chat_template_and_tokens_that_the_base_lacks_are_said(home: Path) -> None:
    marks = ["<|im_start|>", "<|im_end|>"]
    bare = {"unk_token": "t0"}
    (home / "base/tokenizer_config.json").write_text(json.dumps(bare))
    for name, key in (("a", "extra_special_tokens"), ("b", "additional_special_tokens")):
        (home / name / "tokenizer_config.json").write_text(json.dumps(bare | {key: marks}))
        (home / name / "chat_template.jinja").write_text("{{ messages }}")
    lost = "not the chat template and special tokens of the base, which is written"
    wanted = [f'warning: model "{n}": {lost}; choose with --tokenizer-from {n}' for n in "ab"]
    assert succeed(*asked()).err.splitlines() == wanted
    (home / "base/tokenizer_config.json").unlink()
    assert succeed(*asked("--overwrite")).err.splitlines() == wanted
    said = succeed(*asked("--overwrite", "--tokenizer-from", "a"))
    assert not said.err
    assert (home / "out/chat_template.jinja").read_text() == "{{ messages }}"


def test_a_model_without_text_lacks_nothing(home: Path) -> None:
    (home / "base/tokenizer_config.json").write_text('{"unk_token": "t0", "chat_template": "x"}')
    assert not succeed(*asked()).err


# Files that say something else than what was meant


def config(home: Path, text: str) -> str:
    (home / "recipe.yaml").write_text(text)
    return refusal(home, "merge", "recipe.yaml", "--out", "out")


def test_weights_of_a_mergekit_recipe_are_its_own(home: Path) -> None:
    models = [{"model": name, "parameters": {"weight": 0}} for name in "ab"]
    recipe = {"merge_method": "task_arithmetic", "base_model": "base", "models": models}
    wanted = "weight: all are 0; give a model beside the base another one"
    assert config(home, yaml.safe_dump(recipe)) == wanted


def test_a_refusal_quotes_the_beginning_of_a_block(home: Path) -> None:
    block = {f"key{i}": {"model": "m" * 30, "layers": [0, i]} for i in range(9)}
    told = config(home, yaml.safe_dump({"base": block, "models": ["a"]}))
    assert told.startswith("base: must be a valid string, not {'key0': {'layers'")
    assert told.endswith("...")
    assert len(told) < 120
    mergekit = {"merge_method": "linear", "models": [{"model": {"model": "a", "lora": block}}]}
    assert len(config(home, yaml.safe_dump(mergekit))) < 170


def test_a_part_that_zero_wrote_is_named_so(home: Path) -> None:
    save(home / "empty", state(3) | {NORM: torch.empty(0)})
    wanted = f'"{NORM}": no elements here, or in the base: a part that ZeRO-3 wrote'
    problem = refusal(home, *asked(models="a empty"))
    assert problem.startswith(f'model "empty": {wanted}')
    assert problem.endswith("zero_to_fp32.py")
    problem = refusal(home, "merge", "--base", "empty", "--models", "a", "--out", "out")
    assert problem.startswith(f'model "a": {wanted}')


@pytest.mark.parametrize("side", ["lora_{}.weight", "lora_{}.default.weight", "lora_{}"])
@pytest.mark.parametrize(("down", "up"), [("A", "B"), ("down", "up")])
def test_a_file_of_an_adapter_is_no_model(home: Path, side: str, down: str, up: str) -> None:
    held = {f"{BLOCK}.{side.format(end)}": torch.ones(2, 2) for end in (down, up)}
    save_file(held, home / "style.safetensors")
    (home / "lora").mkdir()
    save_file(held, home / "lora/weights.safetensors")
    for name in ("style.safetensors", "lora"):
        assert refusal(home, *asked(models=name)) == (
            f'"{name}": holds an adapter; give the folder that peft saved, with '
            "adapter_model.safetensors and adapter_config.json"
        )


def test_a_folder_of_the_hubs_cache_and_one_of_two_models_get_a_hint(home: Path) -> None:
    cache = home / "models--owner--name"
    save(cache / "snapshots/0123", state(3))
    (cache / "blobs").mkdir()
    told = refusal(home, *asked(models=cache.name))
    assert told.endswith("holds the hub's cache of a model; give its id, or a folder in snapshots/")
    succeed(*asked(models=f"{cache.name}/snapshots/0123"))
    two = save(home / "two", state(3), shards=2)
    (two / "model.safetensors.index.json").rename(home / "index.json")
    told = refusal(home, *asked(models="two"))
    assert told.endswith(
        '"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"; name one'
    )
    (home / "index.json").rename(two / "model.safetensors.index.json")
    save_file(state(4), two / "model.safetensors")
    said = succeed(*asked("--overwrite", models="two")).out
    assert 'note: "two": model.safetensors is read, not "model.safetensors.index.json"\n' in said
    assert_near(load(home / "out"), mean(4))
