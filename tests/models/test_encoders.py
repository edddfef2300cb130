import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from deltafl.errors import DeltaflError
from deltafl.models import load_encoder, save_encoder
from deltafl.models.flat import FlatModel
from tiny_models import Net, tiny_vit

SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 8,
    "patch_size": 4,
}
IMAGES = torch.randint(0, 256, (3, 3, 8, 8), generator=torch.Generator().manual_seed(0)).to(
    torch.uint8
)


def build(family: str):
    import transformers as t

    torch.manual_seed(0)
    if family == "vit":
        return t.ViTModel(t.ViTConfig(**SIZES), add_pooling_layer=False)
    if family == "vit with pooler":
        return t.ViTModel(t.ViTConfig(**SIZES))
    if family == "vit classifier":
        return t.ViTForImageClassification(t.ViTConfig(**SIZES))
    if family == "dinov2":
        return t.Dinov2Model(t.Dinov2Config(**SIZES))
    if family == "clip tower":
        return t.CLIPVisionModel(t.CLIPVisionConfig(**SIZES))
    if family == "clip projected":
        return t.CLIPVisionModelWithProjection(t.CLIPVisionConfig(**SIZES, projection_dim=12))
    text = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 9}
    text |= {"intermediate_size": 32, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    return t.CLIPModel(t.CLIPConfig(text_config=text, vision_config=SIZES, projection_dim=12))


def reference(family: str, model, pixels: torch.Tensor) -> torch.Tensor:
    model.eval()
    if family == "clip tower":
        return model(pixels).pooler_output
    if family == "clip projected":
        return model(pixels).image_embeds
    if family == "clip":
        return model.visual_projection(model.vision_model(pixels).pooler_output)
    backbone = model.vit if family == "vit classifier" else model
    return backbone(pixels).last_hidden_state[:, 0]


FAMILIES = (
    "vit",
    "vit with pooler",
    "vit classifier",
    "dinov2",
    "clip tower",
    "clip projected",
    "clip",
)


@pytest.mark.parametrize("family", FAMILIES)
def test_features_are_those_of_transformers(family: str, tmp_path: Path):
    model = build(family)
    model.save_pretrained(tmp_path / "a")
    processor = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.6, 0.7]}
    (tmp_path / "a" / "preprocessor_config.json").write_text(json.dumps(processor))
    encoder = load_encoder(tmp_path / "a")
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in processor.values())
    with torch.no_grad():
        expected = reference(family, model, (IMAGES / 255 - mean) / std)
        torch.testing.assert_close(encoder.features(IMAGES), expected)
    assert encoder.feature_dim == expected.shape[1]

    (tmp_path / "b").mkdir()
    save_encoder(encoder, tmp_path / "b")
    again = load_encoder(tmp_path / "b")
    assert again.input == encoder.input
    with torch.no_grad():
        assert torch.equal(again.features(IMAGES), encoder.features(IMAGES))


def test_a_mask_token_is_frozen_because_features_do_not_use_it(tmp_path: Path):
    build("dinov2").save_pretrained(tmp_path)
    frozen = [n for n, p in load_encoder(tmp_path).module.named_parameters() if not p.requires_grad]
    assert frozen == ["embeddings.mask_token"]


def test_a_16_bit_file_is_computed_in_float32(tmp_path: Path):
    build("vit").bfloat16().save_pretrained(tmp_path)
    assert {p.dtype for p in load_encoder(tmp_path).module.parameters()} == {torch.float32}


def test_a_new_vit_is_a_model_of_transformers(tmp_path: Path):
    from transformers import AutoModel

    encoder = tiny_vit()
    save_encoder(encoder, tmp_path)
    plain = AutoModel.from_pretrained(tmp_path, add_pooling_layer=False)
    for name, tensor in encoder.module.state_dict().items():
        assert torch.equal(plain.state_dict()[name], tensor)


def test_a_new_vit_depends_on_its_seed_alone():
    before = torch.get_rng_state()
    first, same, other = tiny_vit(1), tiny_vit(1), tiny_vit(2)
    images = IMAGES[:, :1]
    assert torch.equal(first.features(images), same.features(images))
    assert not torch.equal(first.features(images), other.features(images))
    assert torch.equal(torch.get_rng_state(), before)


def test_plugin_round_trip_and_a_merged_directory(tmp_path: Path):
    encoder = load_encoder("tiny_models:Net", {"width": 5})
    assert (encoder.feature_dim, encoder.input.image_size, encoder.input.mean) == (5, 8, (0.25,))
    assert [n for n, p in encoder.module.named_parameters() if not p.requires_grad] == [
        "classifier.weight",
        "classifier.bias",
    ]
    base, merged = tmp_path / "base", tmp_path / "merged"
    base.mkdir()
    save_encoder(encoder, base)
    shutil.copytree(base, merged)
    tensors = load_file(base / "model.safetensors")
    tensors["conv.weight"] = tensors["conv.weight"] + 1
    save_file(tensors, merged / "model.safetensors")
    again = load_encoder(merged)
    assert isinstance(again.module, Net)
    assert torch.equal(again.module.conv.weight, encoder.module.get_parameter("conv.weight") + 1)
    assert again.input == encoder.input


def test_a_plugin_with_tied_tensors(tmp_path: Path):
    encoder = load_encoder("tiny_models:tied_net")
    FlatModel(encoder)
    save_encoder(encoder, tmp_path)
    module = load_encoder(tmp_path).module
    assert torch.equal(
        module.get_parameter("conv.weight"), encoder.module.get_parameter("conv.weight")
    )
    assert module.get_submodule("twin") is module.get_submodule("conv")


def test_a_plugin_in_the_working_directory_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "mine_alone.py").write_text(
        "from torch import nn\ndef small():\n    m = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))\n"
        "    m.input_size = 2\n    return m\n"
    )
    monkeypatch.chdir(tmp_path)
    assert load_encoder("mine_alone:small").feature_dim == 2


def _without_a_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["layernorm.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _misshapen(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["layernorm.weight"] = torch.zeros(3)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _truncated(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])


def _other_family(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "bert"}')


def _not_json(folder: Path) -> None:
    (folder / "config.json").write_text("{")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_without_a_tensor, "layernorm.weight.*missing"),
        (_misshapen, "layernorm.weight.*misshapen"),
        (_truncated, "cannot be loaded"),
        (_other_family, '"bert", known are vit'),
        (_not_json, "cannot be loaded"),
    ],
)
def test_a_damaged_directory_is_one_clear_line(damage, message: str, tmp_path: Path):
    save_encoder(tiny_vit(), tmp_path)
    damage(tmp_path)
    with pytest.raises(DeltaflError, match=message) as caught:
        load_encoder(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("ref", "kwargs", "message"),
    [
        ("nobody/nothing", None, "cannot be loaded"),
        ("no_such_module:x", None, "cannot be imported"),
        ("tiny_models:Nett", None, 'did you mean "Net"'),
        ("tiny_models:Net", {"widht": 3}, "widht"),
        ("tiny_models:tiny_task", None, "not a torch.nn.Module"),
        ("torch.nn:Identity", None, r"gives \(1, 3, 224, 224\), features must be \(1, D\)"),
        ("vit:hiden=3", None, 'did you mean "hidden"'),
        ("vit:hidden=x", None, "whole number"),
        ("vit:hidden=8,layers=1,heads=2,patch=3", None, "lacks image_size"),
        ("vit:hidden=8,layers=1,heads=2,patch=3,image_size=8", None, "multiple of patch"),
        ("some/dir", {"a": 1}, "only module:attr"),
    ],
)
def test_a_wrong_reference_is_one_clear_line(ref: str, kwargs, message: str):
    with pytest.raises(DeltaflError, match=message):
        load_encoder(ref, kwargs)


def test_a_plugin_directory_that_does_not_fit_its_factory(tmp_path: Path):
    save_encoder(load_encoder("tiny_models:Net"), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({**tensors, "extra": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(DeltaflError, match="extra"):
        load_encoder(tmp_path)


def test_images_of_another_size_are_refused():
    with pytest.raises(DeltaflError, match="image_size=8, channels=1"):
        tiny_vit().features(IMAGES)


@pytest.mark.realdata
def test_a_real_network_as_a_plugin(
    realdata: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The published class probabilities are not at hand; that the file's own loader agrees is what can be checked."""
    (tmp_path / "mine.py").write_text(
        f"import sys\nsys.path.append({str(realdata / 'weights')!r})\nimport real_models as W\n"
        f"def small():\n    m = W.load(W.MobileNetV1(0.25), {str(realdata / 'weights')!r}"
        " + '/mobilenet_v1_0.25_128_fp16.safetensors')\n    m.input_size = 128\n    return m\n"
    )
    monkeypatch.chdir(tmp_path)
    encoder = load_encoder("mine:small")
    images = torch.randint(
        0, 256, (2, 3, 128, 128), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    with torch.no_grad():
        torch.testing.assert_close(
            encoder.features(images), encoder.module.embed(images / 127.5 - 1)
        )
    (tmp_path / "saved").mkdir()
    save_encoder(encoder, tmp_path / "saved")
    assert load_encoder(tmp_path / "saved").feature_dim == 256
