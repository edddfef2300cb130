"""Which tensor is which, on real models of transformers and on names alone."""

import itertools
import json
import logging
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from checkpoint_files import load, refusal, succeed
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


@pytest.fixture(scope="module", autouse=True)
def quiet_transformers():
    from transformers.utils import logging as their_logging

    their_logging.disable_progress_bar()
    their_logging.set_verbosity_error()
    logging.getLogger("transformers").setLevel(logging.ERROR)


def vit(kind: str, seed: int, **more: object):
    import transformers

    torch.manual_seed(seed)
    return getattr(transformers, kind)(transformers.ViTConfig(**SIZES, **IMAGE, **more))


def clip(kind: str, seed: int):
    import transformers

    torch.manual_seed(seed)
    vision = {**SIZES, **IMAGE, "projection_dim": 4}
    if kind != "CLIPModel":
        return getattr(transformers, kind)(transformers.CLIPVisionConfig(**vision))
    text = {**SIZES, "vocab_size": 20, "max_position_embeddings": 7, "projection_dim": 4}
    return transformers.CLIPModel(
        transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=4)
    )


def llama(kind: str, seed: int, *, tied: bool = False, vocabulary: int = 20):
    import transformers

    torch.manual_seed(seed)
    config = transformers.LlamaConfig(**SIZES, vocab_size=vocabulary, tie_word_embeddings=tied)
    return getattr(transformers, kind)(config)


def merge_one(root: Path, base: Path, tuned: Path, *more: object) -> dict[str, Tensor]:
    """base + (tuned - base): the fine-tune's own values wherever the names were understood."""
    succeed(
        "merge", "--base", base, "--models", tuned, "--out", root / "out", "--server-lr", 1, *more
    )
    return load(root / "out")


def record(root: Path) -> dict:
    return json.loads((root / "out/deltafl.json").read_text())


def assert_from(merged: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """Every wanted tensor is in the merged model, up to the rounding of base + (tuned - base)."""
    for name, values in wanted.items():
        torch.testing.assert_close(
            merged[name], values, rtol=0, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )


def reload(folder: Path, kind: str = "AutoModel"):
    """from_pretrained, with nothing missing, unexpected or of another shape."""
    import transformers

    model, info = getattr(transformers, kind).from_pretrained(folder, output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model


def test_a_classifier_is_merged_into_its_bare_vit(tmp_path: Path) -> None:
    base, tuned = vit("ViTModel", 0), vit("ViTForImageClassification", 1, num_labels=5)
    base.save_pretrained(tmp_path / "base")
    tuned.save_pretrained(tmp_path / "tuned")
    merged = merge_one(tmp_path, tmp_path / "base", tmp_path / "tuned")
    held = load(tmp_path / "tuned")
    assert_from(
        merged, {n.removeprefix("vit."): t for n, t in held.items() if n.startswith("vit.")}
    )
    assert record(tmp_path)["ignored"] == {
        "tuned": {"classifier: not in the base": ["classifier.bias", "classifier.weight"]}
    }
    assert sorted(record(tmp_path)["copied"]) == ["pooler: not in every model"]
    assert_from(
        merged, {n: t for n, t in load(tmp_path / "base").items() if n.startswith("pooler.")}
    )
    model = reload(tmp_path / "out")
    theirs = dict(tuned.vit.state_dict())
    assert_from(model.state_dict(), theirs)


def test_a_bare_vit_is_merged_into_a_classifier_whose_head_stays(tmp_path: Path) -> None:
    base, tuned = vit("ViTForImageClassification", 0, num_labels=5), vit("ViTModel", 1)
    base.save_pretrained(tmp_path / "base")
    tuned.save_pretrained(tmp_path / "tuned")
    merged = merge_one(tmp_path, tmp_path / "base", tmp_path / "tuned")
    assert_from(
        merged,
        {f"vit.{n}": t for n, t in load(tmp_path / "tuned").items() if not n.startswith("pooler")},
    )
    assert_from(
        merged, {n: t for n, t in load(tmp_path / "base").items() if n.startswith("classifier")}
    )
    reload(tmp_path / "out", "AutoModelForImageClassification")


def test_a_head_of_another_shape_is_copied_from_the_base_and_told(tmp_path: Path) -> None:
    vit("ViTForImageClassification", 0, num_labels=5).save_pretrained(tmp_path / "base")
    vit("ViTForImageClassification", 1, num_labels=3).save_pretrained(tmp_path / "tuned")
    merged = merge_one(tmp_path, tmp_path / "base", tmp_path / "tuned")
    assert record(tmp_path)["copied"] == {
        "classifier: a head of another shape in a model": ["classifier.bias", "classifier.weight"]
    }
    assert_from(
        merged, {n: t for n, t in load(tmp_path / "base").items() if n.startswith("classifier")}
    )
    assert_from(
        merged,
        {n: t for n, t in load(tmp_path / "tuned").items() if not n.startswith("classifier")},
    )


@pytest.mark.parametrize("module_side", ["base", "tuned", "both"])
def test_names_of_modules_and_names_of_files_are_the_same_tensors(
    tmp_path: Path, module_side: str
) -> None:
    base, tuned = vit("ViTModel", 0), vit("ViTForImageClassification", 1, num_labels=5)
    paths = {}
    for name, model in (("base", base), ("tuned", tuned)):
        model.save_pretrained(tmp_path / name)
        paths[name] = tmp_path / name
        if module_side in (name, "both"):
            (tmp_path / name / "model.safetensors").unlink()
            torch.save(model.state_dict(), tmp_path / name / "pytorch_model.bin")
    assert "layers.0.attention.q_proj.weight" in base.state_dict()
    merge_one(tmp_path, paths["base"], paths["tuned"])
    assert (
        record(tmp_path)["merged_tensors"] == 38
    )  # 2 layers of 16, embeddings 4, last norm 2; not the pooler
    assert_from(reload(tmp_path / "out").state_dict(), tuned.vit.state_dict())


VISION = ("CLIPVisionModel", "CLIPVisionModelWithProjection")


@pytest.mark.parametrize("old_names", [False, True], ids=["transformers 5", "transformers 4"])
@pytest.mark.parametrize("kind", VISION)
def test_a_vision_tower_is_merged_into_the_whole_clip(
    tmp_path: Path, kind: str, old_names: bool
) -> None:
    clip("CLIPModel", 0).save_pretrained(tmp_path / "base")
    clip(kind, 1).save_pretrained(tmp_path / "tuned")
    file = tmp_path / "tuned/model.safetensors"
    inner = {
        n if n.startswith(("vision_model.", "visual_projection.")) else f"vision_model.{n}": t
        for n, t in load_file(file).items()
    }
    if old_names:
        save_file(inner, file, metadata={"format": "pt"})
    merged = merge_one(tmp_path, tmp_path / "base", tmp_path / "tuned")
    assert_from(merged, inner)
    untouched = {n: t for n, t in load(tmp_path / "base").items() if n not in inner}
    assert all(torch.equal(merged[n], t) for n, t in untouched.items())
    told = {n for names in record(tmp_path)["copied"].values() for n in names}
    assert told == set(untouched)
    assert ("visual_projection.weight" in told) == (kind == "CLIPVisionModel")
    assert_from(reload(tmp_path / "out").state_dict(), inner)


@pytest.mark.parametrize("kind", VISION)
def test_the_whole_clip_can_be_merged_into_its_vision_tower(tmp_path: Path, kind: str) -> None:
    clip(kind, 0).save_pretrained(tmp_path / "base")
    clip("CLIPModel", 1).save_pretrained(tmp_path / "tuned")
    merged = merge_one(tmp_path, tmp_path / "base", tmp_path / "tuned")
    whole = load(tmp_path / "tuned")
    assert_from(whole, {n if n in whole else f"vision_model.{n}": t for n, t in merged.items()})
    reload(tmp_path / "out", kind)


def test_scope_leaves_the_rest_of_whole_models_alone(tmp_path: Path) -> None:
    for seed, name in enumerate(("base", "tuned")):
        clip("CLIPModel", seed).save_pretrained(tmp_path / name)
    merged = merge_one(tmp_path, tmp_path / "base", tmp_path / "tuned", "--scope", "vision_model")
    for name, values in load(tmp_path / "base").items():
        inside = name.startswith("vision_model.")
        assert_from(merged, {name: load(tmp_path / "tuned")[name] if inside else values})
    assert list(record(tmp_path)["copied"]) == ["outside --scope vision_model"]
    assert list(record(tmp_path)["ignored"]["tuned"]) == ["outside --scope"]


def test_scope_can_be_one_layer_of_a_language_model(tmp_path: Path) -> None:
    for seed, name in enumerate(("base", "tuned")):
        llama("LlamaForCausalLM", seed).save_pretrained(tmp_path / name)
    merged = merge_one(tmp_path, tmp_path / "base", tmp_path / "tuned", "--scope", "model.layers.1")
    changed = {n for n, t in load(tmp_path / "base").items() if not torch.equal(t, merged[n])}
    norms = {
        f"model.layers.1.{n}.weight" for n in ("input_layernorm", "post_attention_layernorm")
    }  # all ones
    assert changed | norms == {n for n in merged if n.startswith("model.layers.1.")}


def test_include_and_exclude_choose_tensors_and_the_rest_is_the_bases(tmp_path: Path) -> None:
    for seed, name in enumerate(("base", "tuned")):
        llama("LlamaForCausalLM", seed).save_pretrained(tmp_path / name)
    more = ("--include", "*.mlp.*", "*.self_attn.*", "--exclude", "*.layers.0.*")
    merged = merge_one(tmp_path, tmp_path / "base", tmp_path / "tuned", *more)
    changed = {n for n, t in load(tmp_path / "base").items() if not torch.equal(t, merged[n])}
    assert changed == {n for n in merged if "layers.1." in n and ("mlp" in n or "self_attn" in n)}


def test_a_tied_model_is_merged_and_stays_tied(tmp_path: Path) -> None:
    models = [llama("LlamaForCausalLM", seed, tied=True) for seed in range(2)]
    for name, model in zip(("base", "tuned"), models, strict=True):
        model.save_pretrained(tmp_path / name)
    merged = merge_one(tmp_path, tmp_path / "base", tmp_path / "tuned")
    assert "lm_head.weight" not in merged
    loaded = reload(tmp_path / "out", "AutoModelForCausalLM")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert_from(loaded.state_dict(), models[1].state_dict())


def tied_with_copy(root: Path, *, change: float) -> None:
    """A tied base, and a fine-tune whose file also holds the head."""
    llama("LlamaForCausalLM", 0, tied=True).save_pretrained(root / "base")
    llama("LlamaForCausalLM", 1, tied=True).save_pretrained(root / "tuned")
    held = load(root / "tuned")
    head = held["model.embed_tokens.weight"].clone()
    head[-1, -1] += change
    save_file(
        held | {"lm_head.weight": head}, root / "tuned/model.safetensors", metadata={"format": "pt"}
    )


def test_a_written_out_head_that_equals_its_twin_is_fine(tmp_path: Path) -> None:
    tied_with_copy(tmp_path, change=0.0)
    merged = merge_one(tmp_path, tmp_path / "base", tmp_path / "tuned")
    assert_from(
        merged, {n: t for n, t in load(tmp_path / "tuned").items() if n != "lm_head.weight"}
    )


def test_a_head_that_differs_from_the_tied_bases_is_an_error(tmp_path: Path) -> None:
    tied_with_copy(tmp_path, change=1e-3)
    args = (
        "merge",
        "--base",
        tmp_path / "base",
        "--models",
        tmp_path / "tuned",
        "--out",
        tmp_path / "out",
    )
    problem = refusal(tmp_path, *args)
    assert problem.startswith(
        'model "tuned": "lm_head.weight" differs from "model.embed_tokens.weight", but in the base the two are one'
    )
    succeed(*args, "--exclude", "model.embed_tokens.weight")


def test_a_state_dict_writes_both_twins_and_merges_with_a_file_that_does_not(
    tmp_path: Path,
) -> None:
    models = [llama("LlamaForCausalLM", seed, tied=True) for seed in range(2)]
    models[0].save_pretrained(tmp_path / "base")
    (tmp_path / "base/model.safetensors").unlink()
    torch.save(models[0].state_dict(), tmp_path / "base/pytorch_model.bin")
    models[1].save_pretrained(tmp_path / "tuned")
    merge_one(tmp_path, tmp_path / "base", tmp_path / "tuned")
    assert_from(
        reload(tmp_path / "out", "AutoModelForCausalLM").state_dict(), models[1].state_dict()
    )


def test_an_untied_base_does_not_take_embeddings_for_its_head(tmp_path: Path) -> None:
    llama("LlamaForCausalLM", 0).save_pretrained(tmp_path / "base")
    llama("LlamaForCausalLM", 1, tied=True).save_pretrained(tmp_path / "tuned")
    args = (
        "merge",
        "--base",
        tmp_path / "base",
        "--models",
        tmp_path / "tuned",
        "--out",
        tmp_path / "out",
    )
    problem = refusal(tmp_path, *args)
    assert problem.startswith('the base: "lm_head.weight" differs from "model.embed_tokens.weight"')
    succeed(*args, "--exclude", "lm_head.weight")
    assert torch.equal(
        load(tmp_path / "out")["lm_head.weight"], load(tmp_path / "base")["lm_head.weight"]
    )


@pytest.mark.parametrize(
    "kinds", [("LlamaModel", "LlamaForCausalLM"), ("LlamaForCausalLM", "LlamaModel")]
)
def test_a_language_model_merges_with_and_without_its_head(
    tmp_path: Path, kinds: tuple[str, str]
) -> None:
    for seed, (name, kind) in enumerate(zip(("base", "tuned"), kinds, strict=True)):
        llama(kind, seed).save_pretrained(tmp_path / name)
    merged = merge_one(tmp_path, tmp_path / "base", tmp_path / "tuned")
    held = {
        n.removeprefix("model."): t
        for n, t in load(tmp_path / "tuned").items()
        if n != "lm_head.weight"
    }
    assert_from({n.removeprefix("model."): t for n, t in merged.items()}, held)
    if kinds[0] == "LlamaForCausalLM":
        assert torch.equal(merged["lm_head.weight"], load(tmp_path / "base")["lm_head.weight"])
        assert record(tmp_path)["copied"] == {"lm_head: not in every model": ["lm_head.weight"]}
    else:
        assert record(tmp_path)["ignored"] == {
            "tuned": {"lm_head: not in the base": ["lm_head.weight"]}
        }


@pytest.mark.parametrize("tied", [False, True])
def test_a_language_model_of_another_vocabulary_is_refused(tmp_path: Path, tied: bool) -> None:
    llama("LlamaForCausalLM", 0, tied=tied).save_pretrained(tmp_path / "base")
    llama("LlamaForCausalLM", 1, tied=tied, vocabulary=22).save_pretrained(tmp_path / "tuned")
    from checkpoint_files import refused

    args = (
        "merge",
        "--base",
        tmp_path / "base",
        "--models",
        tmp_path / "tuned",
        "--out",
        tmp_path / "out",
    )
    names = (
        ["model.embed_tokens.weight"] if tied else ["lm_head.weight", "model.embed_tokens.weight"]
    )
    assert sorted(refused(tmp_path, *args)) == [
        f'model "tuned": tensor "{n}" is (22, 8), the base has (20, 8); another vocabulary?'
        for n in names
    ]


@pytest.mark.parametrize(
    "family", ["ViT", "DeiT", "Dinov2", "Beit", "Dinov2WithRegisters", "ViTMAE", "Bert", "Roberta"]
)
def test_every_tensor_has_one_name_in_the_file_and_in_the_module(
    tmp_path: Path, family: str
) -> None:
    import transformers

    image = {} if family in ("Bert", "Roberta") else IMAGE
    ratio = {"mlp_ratio": 2} if family.startswith("Dinov2") else {}
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}Model")(
        getattr(transformers, f"{family}Config")(**SIZES, **image, **ratio)
    )
    model.save_pretrained(tmp_path)
    written, held = load(tmp_path), model.state_dict()
    names = {canonical(n) for n in written}
    assert len(names) == len(written)  # injective
    assert names == {canonical(n) for n in held}
    by_name = {canonical(n): t for n, t in held.items()}
    assert all(torch.equal(t, by_name[canonical(n)]) for n, t in written.items())
    assert all(canonical(canonical(n)) == canonical(n) for n in written)


# On names alone


def entries(*names: str, shape: tuple[int, ...] = (2, 2), dtype: str = "F32") -> dict[str, Entry]:
    return {n: Entry(dtype, shape) for n in names}


def two_towers(*prefixes: str) -> dict[str, Entry]:
    return entries(*(f"{p}.layers.{i}.weight" for p, i in itertools.product(prefixes, range(9))))


def test_a_model_that_fits_two_towers_needs_a_scope() -> None:
    base, model = two_towers("left", "right"), entries(*(f"layers.{i}.weight" for i in range(9)))
    (problem,) = align(base, {"m": model}).problems
    assert problem == (
        'model "m": its tensors fit several parts of the base equally well ("left", "right"); choose one with --scope'
    )
    found = align(base, {"m": model}, scope="right")
    assert not found.problems
    assert found.merged == tuple(n for n in base if n.startswith("right."))
    assert found.names["m"] == {f"right.layers.{i}.weight": f"layers.{i}.weight" for i in range(9)}


def test_two_towers_whose_names_contain_each_other_are_still_two() -> None:
    base, model = two_towers("a", "ba"), entries(*(f"layers.{i}.weight" for i in range(9)))
    (problem,) = align(base, {"m": model}).problems
    assert '("a", "ba")' in problem


def test_a_prefix_of_data_parallel_training_is_dropped() -> None:
    base = two_towers("net")
    pairs, ours, theirs = match(base, [f"module.{n}" for n in base])
    assert pairs == {n: f"module.{n}" for n in base}
    assert (ours, theirs) == ("", "module.")


def test_the_order_of_the_base_is_the_order_of_the_result() -> None:
    base = two_towers("net")
    shuffled = dict(sorted(base.items(), reverse=True))
    assert align(base, {"m": shuffled}).merged == tuple(base)


def test_a_dtype_of_its_own_is_noted_and_the_bases_wins() -> None:
    base = entries("a.weight", "b.weight")
    found = align(base, {"m": entries("a.weight", "b.weight", dtype="BF16")})
    assert not found.problems
    assert found.notes == ['model "m": 2 tensors are BF16, the base is F32: the result is F32']


def test_one_model_without_a_head_keeps_the_head_of_the_base_for_all() -> None:
    base = entries("net.0.weight", "net.1.weight", "classifier.weight")
    found = align(base, {"whole": base, "bare": entries("net.0.weight", "net.1.weight")})
    assert not found.problems
    assert found.merged == ("net.0.weight", "net.1.weight")
    assert found.copied == {"classifier: not in every model": ["classifier.weight"]}


def test_half_a_head_is_a_missing_tensor() -> None:
    base = entries("net.0.weight", "classifier.weight", "classifier.bias")
    (problem,) = align(base, {"m": entries("net.0.weight", "classifier.weight")}).problems
    assert problem.startswith('model "m": lacks 1 tensor of the base: "classifier.bias"')


def test_many_other_shapes_are_counted_and_not_all_listed() -> None:
    names = [f"net.{i}.weight" for i in range(40)]
    problems = align(entries(*names), {"m": entries(*names, shape=(3, 3))}).problems
    assert len(problems) == 6
    assert problems[-1] == 'model "m": 35 more tensors have another shape than in the base'


def test_integer_codes_of_a_quantised_base_are_refused() -> None:
    base = entries("net.0.scales") | entries("net.0.qweight", dtype="I32")
    (problem,) = align(base, {"m": base}).problems
    assert 'quantised (I32): "net.0.qweight"' in problem


def test_integer_counters_are_not_quantised() -> None:
    base = entries("net.0.weight") | entries(
        "net.0.num_batches_tracked", "embeddings.position_ids", dtype="I64"
    )
    found = align(base, {"m": entries("net.0.weight")})
    assert not found.problems
    assert found.copied == {
        "not a float tensor (I64)": ["net.0.num_batches_tracked", "embeddings.position_ids"]
    }
