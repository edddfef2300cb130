import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoint_files import fails
from deltafl.models import Net, load_net
from deltafl.models.fit import random_head
from tiny_models import NAMES, VIT, Convolution, saved, tiny_llama, tiny_net

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
SIZES |= {"intermediate_size": 32, "image_size": 8, "patch_size": 4}
IMAGES = torch.arange(3 * 3 * 8 * 8).mul(37).remainder(251).view(3, 3, 8, 8).to(torch.uint8)


def build(family: str):
    import transformers as t

    torch.manual_seed(0)
    text = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 9}
    text |= {"intermediate_size": 32, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    both = {"text_config": text, "vision_config": SIZES, "projection_dim": 12}
    vision = t.CLIPVisionConfig(**SIZES, projection_dim=12)
    return {
        "vit": lambda: t.ViTModel(t.ViTConfig(**SIZES), add_pooling_layer=False),
        "vit with pooler": lambda: t.ViTModel(t.ViTConfig(**SIZES)),
        "vit classifier": lambda: t.ViTForImageClassification(t.ViTConfig(**SIZES)),
        "dinov2": lambda: t.Dinov2Model(t.Dinov2Config(**SIZES)),
        "clip tower": lambda: t.CLIPVisionModel(t.CLIPVisionConfig(**SIZES)),
        "clip projected": lambda: t.CLIPVisionModelWithProjection(vision),
        "clip": lambda: t.CLIPModel(t.CLIPConfig(**both)),
    }[family]()


REFERENCES = dict.fromkeys(
    ("vit", "vit with pooler", "dinov2"), lambda m, x: m(x).last_hidden_state[:, 0]
)
REFERENCES |= {
    "vit classifier": lambda m, x: m.vit(x).last_hidden_state[:, 0],
    "clip tower": lambda m, x: m(x).pooler_output,
    "clip projected": lambda m, x: m(x).image_embeds,
    "clip": lambda m, x: m.visual_projection(m.vision_model(x).pooler_output),
}


@pytest.mark.parametrize("family", REFERENCES)
def test_features_are_those_of_transformers(family: str, tmp_path: Path):
    model = build(family)
    model.save_pretrained(tmp_path / "a")
    processor = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.6, 0.7]}
    (tmp_path / "a" / "preprocessor_config.json").write_text(json.dumps(processor))
    net = load_net(tmp_path / "a")
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in processor.values())
    with torch.no_grad():
        expected = REFERENCES[family](model.eval(), (IMAGES / 255 - mean) / std)
        torch.testing.assert_close(net.module.features(IMAGES), expected)
    assert net.module.feature_dim == expected.shape[1]

    again = load_net(saved(net, tmp_path / "b"))
    assert again.inputs == net.inputs
    with torch.no_grad():
        assert torch.equal(again.module.features(IMAGES), net.module.features(IMAGES))


def encoder(net: Net) -> torch.nn.Module:
    return net.module.get_submodule("encoder")


def test_an_encoder_is_float32_and_a_mask_token_that_features_do_not_use_is_frozen(tmp_path: Path):
    build("dinov2").bfloat16().save_pretrained(tmp_path)
    parameters = dict(encoder(load_net(tmp_path)).named_parameters())
    assert {p.dtype for p in parameters.values()} == {torch.float32}
    assert [n for n, p in parameters.items() if not p.requires_grad] == ["embeddings.mask_token"]


@pytest.mark.parametrize("kind", ["vit", "dinov2"])
def test_a_new_model_depends_on_its_seed_alone(kind: str, tmp_path: Path):
    before, found, file = torch.get_rng_state(), [], tmp_path / "config.json"
    for seed in ({}, {"seed": 0}, {"seed": 0}, {"seed": 1}):
        file.write_text(json.dumps(VIT | {"model_type": kind} | seed))
        found.append(load_net(file).flat.detach())
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[1], found[2])
    assert not torch.equal(found[2], found[3])
    assert torch.equal(torch.get_rng_state(), before)


def test_a_language_model_keeps_its_dtype_and_its_tokenizer(tmp_path: Path, caplog):
    net = tiny_llama(tmp_path)
    assert not caplog.records
    assert torch.equal(load_net(tmp_path).flat, net.flat)
    assert "has no weights: they are drawn at random" in caplog.text
    assert net.inputs.max_length == 64
    net = load_net(tmp_path)
    net.module.bfloat16()
    again = load_net(saved(net, tmp_path / "saved"))
    assert again.flat.dtype == torch.bfloat16
    assert torch.equal(again.flat, net.flat)
    assert again.inputs.tokenizer("ab").input_ids == net.inputs.tokenizer("ab").input_ids
    assert not again.module.config.use_cache  # which holds the keys of every layer
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["use_cache"]


def test_a_head_comes_with_its_folder_frozen(tmp_path: Path):
    net = tiny_net()
    assert load_net(saved(net, tmp_path / "none")).module.head is None
    net.module.head = random_head(16, NAMES, torch.Generator())
    head = load_net(saved(net, tmp_path / "a")).module.head
    assert torch.equal(head.weight, net.module.head.weight)
    assert head.class_names == net.module.head.class_names
    assert not any(p.requires_grad for p in head.parameters())


def test_ones_own_encoder_and_a_merged_directory(tmp_path: Path):
    net = load_net("tiny_models:Convolution", {"width": 5})
    assert (net.module.feature_dim, net.inputs.image_size, net.inputs.mean) == (5, 8, (0.25,))
    frozen = [n for n, p in encoder(net).named_parameters() if not p.requires_grad]
    assert frozen == ["classifier.weight", "classifier.bias"]
    merged = saved(net, tmp_path / "merged")
    bias = load_file(merged / "model.safetensors")["conv.bias"] + 1
    rewrite(merged, **{"conv.bias": bias})
    again = load_net(merged)
    assert isinstance(encoder(again), Convolution)
    assert torch.equal(encoder(again).conv.bias, bias)
    assert again.inputs == net.inputs
    rewrite(merged, extra=torch.zeros(1))
    fails("extra", load_net, merged)
    fails("image_size=8, channels=1", lambda: tiny_net().module.features(IMAGES))


@pytest.mark.parametrize(("ref", "kwargs"), [("own_net", {"width": 5}), ("tied_net", {})])
def test_ones_own_net_and_tied_tensors(ref: str, kwargs: dict, tmp_path: Path):
    net = load_net(f"tiny_models:{ref}", kwargs)
    if ref == "tied_net":
        names = ("conv.weight", "conv.bias", "norm.weight", "norm.bias")
        assert list(net.slices) == [f"encoder.{n}" for n in names]
    with torch.no_grad():
        net.flat.add_(1)
    again = load_net(saved(net, tmp_path / "a"))
    assert torch.equal(again.flat, net.flat)
    assert again.inputs == net.inputs


def test_a_factory_in_the_working_directory_is_found(tmp_path, monkeypatch):
    (tmp_path / "mine_alone.py").write_text(
        "from torch import nn\ndef small():\n    m = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))\n"
        "    m.input_size = 2\n    return m\n"
    )
    monkeypatch.chdir(tmp_path)
    assert load_net("mine_alone:small").module.feature_dim == 2


def rewrite(folder: Path, **changes: torch.Tensor | None) -> None:
    file = folder / "model.safetensors"
    tensors = {n: t for n, t in (load_file(file) | changes).items() if t is not None}
    save_file(tensors, file, metadata={"format": "pt"})


def truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])


NORM = "layernorm.weight"
DAMAGE = {
    f"{NORM}.*missing": lambda folder: rewrite(folder, **{NORM: None}),
    f"{NORM}.*misshapen": lambda folder: rewrite(folder, **{NORM: torch.zeros(3)}),
    "cannot be loaded: .*not fully covered": truncate,
    '"resnet"; known are causal': lambda f: (f / "config.json").write_text(
        '{"model_type": "resnet"}'
    ),
    "cannot be loaded": lambda folder: (folder / "config.json").write_text("{"),
}


@pytest.mark.parametrize("message", DAMAGE)
def test_a_damaged_directory_is_one_clear_line(message: str, tmp_path: Path):
    tiny_net().save(tmp_path)
    DAMAGE[message](tmp_path)
    fails(message, load_net, tmp_path)


@pytest.mark.parametrize(
    ("ref", "kwargs", "message"),
    [
        ("nobody/nothing", None, "cannot be loaded"),
        ("no/such/config.json", None, "No such file"),
        ("no_such_module:x", None, "cannot be imported"),
        ("tiny_models:Convolutio", None, "cannot be imported"),
        ("tiny_models:Convolution", {"widht": 3}, "widht"),
        ("tiny_models:tiny_images", None, "not a torch.nn.Module"),
        ("torch.nn:Identity", None, r"gives \(1, 3, 224, 224\), features must be \(1, D\)"),
        ("some/dir", {"a": 1}, "only module:attr"),
    ],
)
def test_a_wrong_reference_is_one_clear_line(ref: str, kwargs, message: str):
    fails(message, load_net, ref, kwargs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": None}, "cannot be loaded"),
        ({"model_type": "no such"}, "cannot be loaded"),
        ({"hiden_size": 8}, 'unknown key "hiden_size"; did you mean "hidden_size"'),
        ({"hidden_size": "8"}, "hidden_size"),
        ({"model_type": "llama", "vocab_size": 9}, "cannot be loaded"),
        ({"model_type": ["vit"]}, "cannot be loaded"),
        ({"seed": "x"}, "its seed a whole number"),
        ({"patch_size": 0}, "cannot be loaded"),
        ({"num_attention_heads": 0}, "cannot be loaded"),
        ({"image_size": [8]}, "cannot be loaded"),
    ],
)
def test_a_wrong_configuration_of_a_new_model(change, message: str, tmp_path: Path):
    (tmp_path / "mine.json").write_text(json.dumps(VIT | change))
    fails(message, load_net, tmp_path / "mine.json")
