import pytest
import torch
from torch import Tensor, nn

from deltafl.models.encoder import InputSpec, LoadedEncoder
from deltafl.models.flat import FlatModel
from deltafl.sparse.eligible import eligible
from tiny_models import tiny_task, tiny_vit

KEYS = ("layers.0.attention.k_proj.bias", "layers.1.attention.k_proj.bias")


class Fused(nn.Module):
    """timm's and DINO's layout."""

    def __init__(self, norm: bool = False) -> None:
        super().__init__()
        self.num_heads = 2
        self.qkv = nn.Linear(8, 24)
        self.k_norm = nn.LayerNorm(4) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).reshape(len(x), -1, 3, 2, 4).permute(2, 0, 3, 1, 4)
        return (
            nn.functional.scaled_dot_product_attention(q, self.k_norm(k), v)
            .transpose(1, 2)
            .flatten(2)
        )


class Separate(nn.Module):
    def __init__(self, shared: bool = False) -> None:
        super().__init__()
        self.query, self.value = nn.Linear(8, 8), nn.Linear(8, 8)
        self.key = self.query if shared else nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(self.query(x), self.key(x), self.value(x))


class Torch(nn.Module):
    def __init__(self, **kwargs: bool) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True, **kwargs)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


class Tokens(nn.Module):
    """Attention between the eight columns of an image."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.lift, self.attention = nn.Linear(8, 8), attention

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(self.lift(x[:, 0])).tanh().mean(1)


def flat(attention: nn.Module) -> FlatModel:
    module = Tokens(attention)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(generator=draw)
    return FlatModel(
        LoadedEncoder(module, nn.Module.__call__, InputSpec(8, 1, (0.5,), (0.5,)), 8, "tokens")
    )


def influence(model: FlatModel, name: str) -> Tensor:
    """|d features / d parameter|, summed over images."""
    parameter = dict(model.module.named_parameters())[name]
    images = tiny_task().train.images[:4]
    return sum(
        torch.autograd.grad(f, parameter, retain_graph=True)[0].abs()
        for f in model.features(images).flatten()
    )


def test_key_biases_of_transformers_are_excluded_and_named():
    able = eligible(FlatModel(tiny_vit()))
    assert tuple(able.excluded) == KEYS
    assert all("key bias" in why for why in able.excluded.values())
    for name in able.shapes:
        assert able.numel(name) == (0 if name in KEYS else torch.Size(able.shapes[name]).numel())
    assert able.total == sum(torch.Size(s).numel() for s in able.shapes.values()) - 2 * 16


@pytest.mark.parametrize(
    ("attention", "name", "third"),
    [
        (Fused(), "attention.qkv.bias", True),
        (Separate(), "attention.key.bias", False),
        (Torch(), "attention.attention.in_proj_bias", True),
    ],
)
def test_what_is_excluded_is_what_moves_no_feature(attention, name, third):
    """Excluded coordinates have no influence beyond rounding, all others of the tensor have."""
    model = flat(attention)
    able = eligible(model)
    assert list(able.excluded) == [name]
    part = able.of(name)
    assert part is not None
    assert int(part.sum()) == (16 if third else 0)
    strength = influence(model, name)
    assert strength[~part].max() < 1e-5
    if third:
        assert strength[part].min() > 1e-3
        assert name in able.fused


@pytest.mark.parametrize(
    ("attention", "name"),
    [
        (Fused(norm=True), "attention.qkv.bias"),
        (Separate(shared=True), "attention.query.bias"),
        (Torch(add_bias_kv=True), "attention.attention.in_proj_bias"),
        (Torch(add_zero_attn=True), "attention.attention.in_proj_bias"),
    ],
)
def test_key_biases_that_matter_stay_eligible(attention, name):
    model = flat(attention)
    assert not eligible(model).excluded
    assert influence(model, name).min() > 1e-4


def test_a_key_bias_that_another_module_uses_stays_eligible():
    attention = Separate()
    attention.query.bias = attention.key.bias
    assert not eligible(flat(attention)).excluded


def test_fused_weights_are_known_and_wholly_eligible():
    able = eligible(flat(Fused()))
    assert able.fused == {"attention.qkv.weight", "attention.qkv.bias"}
    assert able.of("attention.qkv.weight") is None


def test_frozen_parameters_are_not_listed():
    encoder = tiny_vit()
    encoder.module.layers[0].attention.k_proj.bias.requires_grad_(False)
    able = eligible(FlatModel(encoder))
    assert KEYS[0] not in able.shapes
    assert tuple(able.excluded) == KEYS[1:]
