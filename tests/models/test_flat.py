import copy

import pytest
import torch
from safetensors.torch import load_file

from deltafl.errors import DeltaflError
from deltafl.models import load_encoder, save_encoder
from deltafl.models.encoder import LoadedEncoder
from deltafl.models.flat import FlatModel
from tiny_models import tiny_task, tiny_vit


def net() -> LoadedEncoder:
    return load_encoder("tiny_models:Net")


@pytest.mark.parametrize("make", [tiny_vit, net])
def test_parameters_and_gradients_are_views_of_one_vector(make):
    encoder = make()
    before = {
        n: p.detach().clone() for n, p in encoder.module.named_parameters() if p.requires_grad
    }
    images = tiny_task().train.images
    plain = encoder.copy_to("cpu")
    model = FlatModel(encoder)
    assert list(model.tensors()) == list(before)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.tensors().items())
    assert torch.equal(model.flat.detach(), torch.cat([p.reshape(-1) for p in before.values()]))

    model.features(images).square().sum().backward()
    plain.features(images).square().sum().backward()
    expected = torch.cat([p.grad.reshape(-1) for p in plain.module.parameters() if p.requires_grad])
    assert torch.equal(model.flat.grad, expected)

    with torch.no_grad():
        model.flat.add_(1)
    for name, parameter in encoder.module.named_parameters():
        if name in before:
            assert torch.equal(parameter, before[name] + 1)


def test_tied_parameters_are_held_once():
    encoder = load_encoder("tiny_models:tied_net")
    model = FlatModel(encoder)
    assert list(model.slices) == ["conv.weight", "conv.bias", "norm.weight", "norm.bias"]
    with torch.no_grad():
        model.flat.zero_()
    assert not encoder.module.twin.weight.any()


def test_load_takes_file_names_module_names_and_buffers(tmp_path):
    other = tiny_vit(1)
    save_encoder(other, tmp_path)
    by_file = load_file(tmp_path / "model.safetensors")
    assert any("attention.attention.query" in name for name in by_file)
    for tensors in (
        by_file,
        other.module.state_dict(),
        {f"vit.{n}": t for n, t in by_file.items()},
    ):
        model = FlatModel(tiny_vit(0))
        assert model.load({**tensors, "pooler.dense.weight": torch.zeros(1)}) == (
            "pooler.dense.weight",
        )
        assert all(torch.equal(t, other.module.state_dict()[n]) for n, t in model.tensors().items())

    model = FlatModel(net())
    tensors = {n: torch.full_like(t, 3) for n, t in model.module.state_dict().items()}
    assert model.load(tensors) == ()
    assert all((t == 3).all() for t in model.module.state_dict().values())


def test_load_of_what_does_not_fit_changes_nothing():
    model = FlatModel(tiny_vit())
    before = model.flat.detach().clone()
    tensors = {n: t + 1 for n, t in model.tensors().items()}
    missing = {n: t for n, t in tensors.items() if n != "layernorm.bias"}
    with pytest.raises(DeltaflError, match=r"layernorm\.bias"):
        model.load(missing)
    with pytest.raises(DeltaflError, match=r'"layernorm\.bias" is \(3,\), the model has \(16,\)'):
        model.load({**tensors, "layernorm.bias": torch.zeros(3)})
    assert torch.equal(model.flat.detach(), before)


def test_a_copy_of_a_flat_models_module_is_independent():
    model = FlatModel(tiny_vit())
    twin = copy.deepcopy(model.module)
    with torch.no_grad():
        model.flat.zero_()
    assert any(p.any() for p in twin.parameters())


def test_nothing_to_train():
    encoder = tiny_vit()
    encoder.module.requires_grad_(False)
    with pytest.raises(DeltaflError, match="no trainable parameter"):
        FlatModel(encoder)
