"""Which tensor is which, on real models of transformers and on names alone."""

import itertools
import json
import re
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from checkpoint_files import load, refusal, reloaded, succeed
from deltafl.checkpoints.align import align
from deltafl.checkpoints.layout import Entry
from deltafl.checkpoints.naming import canonical, match

SIZES = {
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 16,
}
IMAGE = {"image_size": 8, "patch_size": 4}


def make(root: Path, kind: str, name: str, **more: object) -> dict[str, Tensor]:
    """A model of transformers, saved as root/name, seeded by the name; what its file holds."""
    import transformers as t

    torch.manual_seed({"base": 0, "tuned": 1}[name])
    if kind.startswith("ViT"):
        config = t.ViTConfig(**SIZES, **IMAGE, **more)
    elif kind.startswith("Llama"):
        config = t.LlamaConfig(**SIZES, **{"vocab_size": 20} | more)
    elif kind == "CLIPModel":
        text = {**SIZES, "vocab_size": 20, "max_position_embeddings": 7, "projection_dim": 4}
        vision = {**SIZES, **IMAGE, "projection_dim": 4}
        config = t.CLIPConfig(text_config=text, vision_config=vision, projection_dim=4)
    else:
        config = t.CLIPVisionConfig(**SIZES, **IMAGE, projection_dim=4)
    getattr(t, kind)(config).save_pretrained(root / name)
    return load(root / name)


def arguments(root: Path, *more: object) -> list[object]:
    folders = "--base", root / "base", "--models", root / "tuned", "--out", root / "out"
    return ["merge", *folders, *more]


def merge_one(root: Path, *more: object) -> tuple[dict[str, Tensor], dict]:
    """base + (tuned - base), the fine-tune's own values where names were understood; the record."""
    succeed(*arguments(root, "--server-lr", 1, *more))
    return load(root / "out"), json.loads((root / "out/deltafl.json").read_text())


def rewrite(folder: Path, held: Mapping[str, Tensor], *, pickled: bool = False) -> None:
    """Give a model another file of weights."""
    file = folder / "model.safetensors"
    if pickled:
        file.unlink()
        torch.save(dict(held), folder / "pytorch_model.bin")
    else:
        save_file(dict(held), file, metadata={"format": "pt"})


def assert_from(merged: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """Every wanted tensor is in the merged model, up to the rounding of base + (tuned - base)."""
    for name, values in wanted.items():
        torch.testing.assert_close(
            merged[name], values, rtol=0, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )


CLASSIFIER, CAUSAL = "ViTForImageClassification", "LlamaForCausalLM"
TOWER, PROJECTED = "CLIPVisionModel", "CLIPVisionModelWithProjection"
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
PAIRS = [
    ("ViTModel", CLASSIFIER, "pooler: not in every model", "classifier: not in the base"),
    (CLASSIFIER, "ViTModel", "classifier: not in every model", "pooler: not in the base"),
    (CLASSIFIER, CLASSIFIER, "classifier: a head of another shape in a model", None),
    ("LlamaModel", CAUSAL, None, "lm_head: not in the base"),
    (CAUSAL, "LlamaModel", "lm_head: not in every model", None),
    *(("CLIPModel", kind, "logit_scale: not in every model", None) for kind in (TOWER, PROJECTED)),
    *((kind, "CLIPModel", None, "logit_scale: not in the base") for kind in (TOWER, PROJECTED)),
]
"""The kinds of a base and of a fine-tune, and one of the reasons why a tensor is copied, and is ignored."""


def body(held: Mapping[str, Tensor]) -> dict[str, str]:
    """Name in the body of the model -> name."""
    return {re.sub(r"^(vit|model|vision_model)\.", "", name): name for name in held}


@pytest.mark.parametrize(("base_kind", "tuned_kind", "copied", "ignored"), PAIRS)
def test_models_of_two_kinds_are_merged_where_they_are_alike(
    tmp_path, base_kind, tuned_kind, copied, ignored
):
    """The rest is the base's, and told; the result loads as what the base is."""
    base = make(tmp_path, base_kind, "base", num_labels=5)
    tuned = make(tmp_path, tuned_kind, "tuned", num_labels=3)
    merged, record = merge_one(tmp_path)
    pairs = [(name, body(tuned).get(own)) for own, name in body(base).items()]
    alike = {ours: tuned[n] for ours, n in pairs if n and tuned[n].shape == base[ours].shape}
    assert any(".1." in name for name in alike)
    assert_from(merged, alike)
    rest = base.keys() - alike.keys()
    assert all(torch.equal(merged[name], base[name]) for name in rest)
    assert {n for names in record["copied"].values() for n in names} == rest
    assert copied is None or copied in record["copied"]
    assert ignored is None or ignored in record["ignored"]["tuned"]
    reloaded(tmp_path / "out", base_kind)


@pytest.mark.parametrize("kind", [TOWER, PROJECTED])
def test_a_vision_tower_of_transformers_4_is_merged_into_the_whole_clip(tmp_path, kind):
    make(tmp_path, "CLIPModel", "base")
    tuned, whole = make(tmp_path, kind, "tuned"), ("vision_model.", "visual_projection.")
    inner = {n if n.startswith(whole) else f"vision_model.{n}": t for n, t in tuned.items()}
    rewrite(tmp_path / "tuned", inner)
    assert_from(merge_one(tmp_path)[0], inner)


@pytest.mark.parametrize("module_side", [["base"], ["tuned"], ["base", "tuned"]])
def test_names_of_modules_and_names_of_files_are_the_same_tensors(tmp_path, module_side):
    make(tmp_path, "ViTModel", "base")
    make(tmp_path, CLASSIFIER, "tuned", num_labels=5)
    tuned = reloaded(tmp_path / "tuned", "AutoModelForImageClassification").state_dict()
    states = {"base": reloaded(tmp_path / "base").state_dict(), "tuned": tuned}
    assert "layers.0.attention.q_proj.weight" in states["base"]
    for name in module_side:
        rewrite(tmp_path / name, states[name], pickled=True)
    _, record = merge_one(tmp_path)
    assert record["merged_tensors"] == 38  # 2 layers of 16, embeddings 4, last norm 2; no pooler
    body = {n.removeprefix("vit."): t for n, t in tuned.items() if n.startswith("vit.")}
    assert_from(reloaded(tmp_path / "out").state_dict(), body)


CHOSEN = {
    "--scope vision_model": ("CLIPModel", lambda n: n.startswith("vision_model.")),
    "--scope model.layers.1": (CAUSAL, lambda n: ".layers.1." in n),
    "--include *.mlp.* *.self_attn.* --exclude *.layers.0.*": (
        CAUSAL,
        lambda n: "layers.1." in n and ("mlp" in n or "self_attn" in n),
    ),
}


@pytest.mark.parametrize("options", CHOSEN)
def test_a_part_is_chosen_and_the_rest_is_the_bases(tmp_path: Path, options: str) -> None:
    kind, chosen = CHOSEN[options]
    base, tuned = make(tmp_path, kind, "base"), make(tmp_path, kind, "tuned")
    merged, record = merge_one(tmp_path, *options.split())
    assert_from(merged, {n: tuned[n] if chosen(n) else t for n, t in base.items()})
    if options.startswith("--scope"):
        assert list(record["copied"]) == [f"outside {options}"]
        assert list(record["ignored"]["tuned"]) == ["outside --scope"]


@pytest.mark.parametrize("written_out", ["", "base", "tuned"])
def test_a_tied_model_is_merged_and_stays_tied(tmp_path: Path, written_out: str) -> None:
    """A state dict holds both twins, which must be equal; the file of transformers holds one."""
    held = {n: make(tmp_path, CAUSAL, n, tie_word_embeddings=True) for n in ("base", "tuned")}
    if written_out:
        both = held[written_out] | {HEAD: held[written_out][EMBEDDING].clone()}
        rewrite(tmp_path / written_out, both, pickled=written_out == "base")
    merged, _ = merge_one(tmp_path)
    assert (HEAD in merged) == (written_out == "base")
    loaded = reloaded(tmp_path / "out", "AutoModelForCausalLM")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert_from(loaded.state_dict(), held["tuned"])
    if written_out == "tuned":
        both[HEAD][-1, -1] += 1e-3
        rewrite(tmp_path / "tuned", both)
        problem = refusal(tmp_path, *arguments(tmp_path, "--overwrite"))
        differs = f'"{HEAD}" differs from "{EMBEDDING}", but in the base the two are one'
        assert problem.startswith(f'model "tuned": {differs}')
        succeed(*arguments(tmp_path, "--exclude", EMBEDDING, "--overwrite"))


def test_an_untied_base_does_not_take_embeddings_for_its_head(tmp_path: Path) -> None:
    base = make(tmp_path, CAUSAL, "base")
    make(tmp_path, CAUSAL, "tuned", tie_word_embeddings=True)
    problem = refusal(tmp_path, *arguments(tmp_path))
    assert problem.startswith(f'the base: "{HEAD}" differs from "{EMBEDDING}"')
    assert torch.equal(merge_one(tmp_path, "--exclude", HEAD)[0][HEAD], base[HEAD])


@pytest.mark.parametrize("tied", [False, True])
def test_a_language_model_of_another_vocabulary_is_refused(tmp_path: Path, tied: bool) -> None:
    make(tmp_path, CAUSAL, "base", tie_word_embeddings=tied)
    make(tmp_path, CAUSAL, "tuned", tie_word_embeddings=tied, vocab_size=22)
    both = f'"{EMBEDDING}"' if tied else f'"{HEAD}", "{EMBEDDING}"'
    told = (
        f'model "tuned": {both}: 22 rows, the base has 20; another vocabulary? Find rows by token'
    )
    assert refusal(tmp_path, *arguments(tmp_path)).startswith(told)


@pytest.mark.parametrize(
    "family", ["ViT", "DeiT", "Dinov2", "Beit", "Dinov2WithRegisters", "ViTMAE", "Bert", "Roberta"]
)
def test_every_tensor_has_one_name_in_the_file_and_in_the_module(tmp_path, family):
    import transformers

    image = {} if family in ("Bert", "Roberta") else IMAGE
    ratio = {"mlp_ratio": 2} if family.startswith("Dinov2") else {}
    config = getattr(transformers, f"{family}Config")(**SIZES, **image, **ratio)
    model = getattr(transformers, f"{family}Model")(config)
    model.save_pretrained(tmp_path)
    written = load(tmp_path)
    by_name = {canonical(n): t for n, t in model.state_dict().items()}
    assert {canonical(n) for n in written} == by_name.keys()
    assert len(by_name) == len(written)  # injective
    assert all(torch.equal(t, by_name[canonical(n)]) for n, t in written.items())
    assert all(canonical(canonical(n)) == canonical(n) for n in written)


# On names alone


def entries(*names: str, shape: tuple[int, ...] = (2, 2), dtype: str = "F32") -> dict[str, Entry]:
    return {n: Entry(dtype, shape) for n in names}


def two_towers(*prefixes: str) -> dict[str, Entry]:
    return entries(*(f"{p}.layers.{i}.weight" for p, i in itertools.product(prefixes, range(9))))


@pytest.mark.parametrize(("left", "right"), [("left", "right"), ("a", "ba")])
def test_a_model_that_fits_two_towers_needs_a_scope(left: str, right: str) -> None:
    base, model = two_towers(left, right), entries(*(f"layers.{i}.weight" for i in range(9)))
    told = (
        f'model "m": its tensors fit several parts of the base equally well ("{left}", "{right}")'
    )
    assert align(base, {"m": model}).problems == [f"{told}; choose one with --scope"]
    found = align(base, {"m": dict(reversed(model.items()))}, scope=right)
    assert not found.problems
    assert found.merged == tuple(n for n in base if n.startswith(f"{right}."))
    assert found.names["m"] == {f"{right}.{n}": n for n in model}


def test_a_prefix_of_data_parallel_training_is_dropped() -> None:
    base = two_towers("net")
    pairs, ours, theirs = match(base, [f"module.{n}" for n in base])
    assert pairs == {n: f"module.{n}" for n in base}
    assert (ours, theirs) == ("", "module.")


def test_a_dtype_of_its_own_is_noted_and_integers_are_copied_unless_they_are_codes() -> None:
    base = entries("a.weight", "b.weight")
    found = align(base, {"m": entries("a.weight", "b.weight", dtype="BF16")})
    assert not found.problems
    assert found.notes == ['model "m": 2 tensors are BF16, the base is F32: the result is F32']
    counters = ["net.0.num_batches_tracked", "embeddings.position_ids"]
    base = entries("net.0.weight") | entries(*counters, dtype="I64")
    found = align(base, {"m": entries("net.0.weight")})
    assert not found.problems
    assert found.copied == {"not a float tensor (I64)": counters}
    base = entries("net.0.scales") | entries("net.0.qweight", dtype="I32")
    (problem,) = align(base, {"m": base}).problems
    assert 'quantised (I32): "net.0.qweight"' in problem


def test_half_a_head_is_a_missing_tensor_and_many_other_shapes_are_counted() -> None:
    base = entries("net.0.weight", "classifier.weight", "classifier.bias")
    (problem,) = align(base, {"m": entries("net.0.weight", "classifier.weight")}).problems
    assert problem.startswith('model "m": lacks "classifier.bias" of the base')
    names = [f"net.{i}.weight" for i in range(40)]
    problems = align(entries(*names), {"m": entries(*names, shape=(3, 3))}).problems
    assert len(problems) == 6
    assert problems[-1] == 'model "m": 35 more tensors have another shape than in the base'
