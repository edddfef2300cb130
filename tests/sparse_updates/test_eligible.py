import pytest
import torch
from torch import Tensor, nn

from deltafl.models import Net
from deltafl.sparse.eligible import eligible, excluded
from deltafl.tasks import ImageInput
from tiny_models import tiny_images, tiny_net

KEYS = tuple(f"encoder.layers.{i}.attention.k_proj.bias" for i in (0, 1))

IMAGES = tiny_images().splits["train"].images[:4] / 127.5 - 1


class Fused(nn.Module):
    """timm's and DINO's layout."""

    def __init__(self, norm: bool = False) -> None:
        super().__init__()
        self.num_heads = 2
        self.qkv = nn.Linear(8, 24)
        self.k_norm = nn.LayerNorm(4) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).reshape(len(x), -1, 3, 2, 4).permute(2, 0, 3, 1, 4)
        attended = nn.functional.scaled_dot_product_attention(q, self.k_norm(k), v)
        return attended.transpose(1, 2).flatten(2)


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


class Grouped(nn.Module):
    """Four queries on two keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(8, dim) for dim in (8, 4, 4))

    def forward(self, x: Tensor) -> Tensor:
        parts = (p(x).unflatten(2, (-1, 2)).mT.mT.transpose(1, 2) for p in self.children())
        attended = nn.functional.scaled_dot_product_attention(*parts, enable_gqa=True)
        return attended.transpose(1, 2).flatten(2)


def net_of(attention: nn.Module) -> Net:
    module = Tokens(attention)
    draw = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        parameter.data.normal_(generator=draw)
    return Net(module, ImageInput(8, 1, (0.5,), (0.5,)))


def influence(net: Net, name: str, **tokens) -> Tensor:
    """|d output / d parameter|, summed over a batch."""
    outputs = net(**tokens).logits if tokens else net(IMAGES)
    parameter = net.module.get_parameter(name)
    grads = (torch.autograd.grad(f, parameter, retain_graph=True) for f in outputs.flatten())
    return sum(grad[0].abs() for grad in grads)


def test_key_biases_of_transformers_are_excluded_and_named():
    net = tiny_net()
    able = eligible(net)
    assert tuple(excluded(able)) == KEYS
    assert all("key bias" in why for why in excluded(able).values())
    assert list(able) == list(net.slices)
    for name, part in able.items():
        assert part.shape == net.trained[name].shape
        assert part.any() != (name in KEYS)
    net = tiny_net()
    net.module.get_parameter(KEYS[0]).requires_grad_(False)
    assert tuple(excluded(eligible(net))) == KEYS[1:]


def shared() -> Separate:
    attention = Separate()
    attention.query.bias = attention.key.bias
    return attention


@pytest.mark.parametrize(
    ("attention", "name", "kept"),
    [
        (Fused(), "attention.qkv.bias", 2 / 3),
        (Separate(), "attention.key.bias", 0),
        (Grouped(), "attention.k_proj.bias", 0),
        (Torch(), "attention.attention.in_proj_bias", 2 / 3),
        (Fused(norm=True), "attention.qkv.bias", 1),
        (Separate(shared=True), "attention.query.bias", 1),
        (shared(), "attention.query.bias", 1),
        (Torch(add_bias_kv=True), "attention.attention.in_proj_bias", 1),
        (Torch(add_zero_attn=True), "attention.attention.in_proj_bias", 1),
    ],
)
def test_what_is_excluded_is_what_moves_no_feature(attention, name, kept):
    """Excluded coordinates have no influence beyond rounding, all others of the tensor have."""
    net = net_of(attention)
    able = eligible(net)
    assert list(excluded(able)) == [name] * (kept < 1)
    part, strength = able[name], influence(net, name)
    assert float(part.float().mean()) == pytest.approx(kept)
    assert (strength[~part] < 1e-5).all()
    assert (strength[part] > 1e-4).all()


def test_rotated_keys_of_llama_types_depend_on_their_bias():
    """Qwen2: grouped queries, biases, and keys rotated by position, outside of the attention module."""
    import transformers as t

    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    module = t.Qwen2ForCausalLM(t.Qwen2Config(vocab_size=11, **sizes, **heads)).double()
    draw = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        parameter.data.normal_(generator=draw)
    net = Net(module, ImageInput(8, 1, (0.5,), (0.5,)))
    assert not excluded(eligible(net))
    name = "model.layers.0.self_attn.k_proj.bias"
    assert influence(net, name, input_ids=torch.arange(6)[None]).max() > 1e-3
