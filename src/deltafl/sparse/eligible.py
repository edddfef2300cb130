"""Which coordinates of an encoder a mask may keep."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from deltafl.models.flat import FlatModel

PROJECTIONS = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("to_q", "to_k", "to_v"),
    ("q_lin", "k_lin", "v_lin"),
    ("wq", "wk", "wv"),
)
"""What attention modules call their projections: transformers, diffusers and lucidrains, DistilBERT, plain code."""

KEY_TRANSFORMS = ("norm", "rope", "rotary", "temperature", "logit_scale")
"""Parts of an attention module's own names that say that keys are more than projected: a bias then has influence."""


@dataclass(frozen=True)
class Eligible:
    """Trainable tensors in the order of `FlatModel.flat`; True = a mask may keep the coordinate.

    shapes: every trainable tensor. partial: bool, in the tensor's shape, for tensors that are not eligible as a whole;
    the others are. excluded: tensor name -> why, of each in `partial`. fused: tensors whose first dimension holds
    query, key and value, in thirds.
    """

    shapes: Mapping[str, tuple[int, ...]]
    partial: Mapping[str, Tensor]
    excluded: Mapping[str, str]
    fused: frozenset[str]

    def of(self, name: str) -> Tensor | None:
        """bool in the tensor's shape; None: all of it is eligible."""
        return self.partial.get(name)

    def numel(self, name: str) -> int:
        """Number of eligible coordinates of one tensor."""
        part = self.partial.get(name)
        return torch.Size(self.shapes[name]).numel() if part is None else int(part.sum())

    @property
    def total(self) -> int:
        """Number of eligible coordinates."""
        return sum(self.numel(name) for name in self.shapes)


def eligible(model: FlatModel) -> Eligible:
    """All trainable coordinates but the biases of attention keys, which are found by the structure of the modules.

    softmax_j(q . (k_j + b)) = softmax_j(q . k_j): the bias moves no feature, its gradient is rounding noise, and a
    mask of the least sensitive coordinates would take all of it. Seen are separate projections (`PROJECTIONS`), a
    fused Linear `qkv` (timm, DINO) and the `in_proj_bias` of nn.MultiheadAttention, of which the key's third is
    excluded. Keys that are normalised, rotated or joined by other keys depend on the bias; there it stays eligible, as
    it does where another module shares the parameter. The masks are on the CPU.
    """
    names = {id(p): n for n, p in model.module.named_parameters() if n in model.slices}
    shapes = {name: tuple(tensor.shape) for name, tensor in model.tensors().items()}
    uses = [
        id(p)
        for module in model.module.modules()
        for p in module._parameters.values()
        if p is not None
    ]
    partial: dict[str, Tensor] = {}
    for bias, third in _key_biases(model.module):
        if id(bias) in names and uses.count(id(bias)) == 1:
            kept = torch.zeros(bias.shape, dtype=torch.bool)
            if third:
                kept[: len(bias) // 3] = True
                kept[2 * len(bias) // 3 :] = True
            partial[names[id(bias)]] = kept
    ordered = {name: partial[name] for name in shapes if name in partial}
    excluded = {
        name: "the key's third of a fused attention bias: softmax is shift-invariant"
        if part.any()
        else "an attention key bias: softmax is shift-invariant"
        for name, part in ordered.items()
    }
    fused = {names[id(p)] for p in _fused(model.module) if id(p) in names}
    return Eligible(shapes, ordered, excluded, frozenset(fused))


def _key_biases(root: nn.Module) -> Iterator[tuple[Tensor, bool]]:
    """(bias, whether the key is a third of it) of each attention module whose keys are only projected."""
    for module in root.modules():
        if isinstance(module, nn.MultiheadAttention):
            if (
                module.in_proj_bias is not None
                and module.bias_k is None
                and not module.add_zero_attn
            ):
                yield module.in_proj_bias, True
            continue
        if any(word in name for name in _own_names(module) for word in KEY_TRANSFORMS):
            continue
        for triple in PROJECTIONS:
            query, key, value = (getattr(module, name, None) for name in triple)
            if not all(isinstance(part, nn.Linear) for part in (query, key, value)) or key in (
                query,
                value,
            ):
                continue
            if isinstance(key, nn.Linear) and key.bias is not None:
                yield key.bias, False
        if (linear := _qkv(module)) is not None and linear.bias is not None:
            yield linear.bias, True


def _fused(root: nn.Module) -> Iterator[Tensor]:
    """Parameters whose first dimension is query, key and value."""
    for module in root.modules():
        if isinstance(module, nn.MultiheadAttention):
            yield from (p for p in (module.in_proj_weight, module.in_proj_bias) if p is not None)
        elif (linear := _qkv(module)) is not None:
            yield from linear.parameters()


def _qkv(module: nn.Module) -> nn.Linear | None:
    """The fused projection of an attention module in timm's layout, (query, key, value) along the outputs."""
    linear = getattr(module, "qkv", None)
    fused = isinstance(linear, nn.Linear) and linear.out_features == 3 * linear.in_features
    return linear if fused and hasattr(module, "num_heads") else None


def _own_names(module: nn.Module) -> list[str]:
    """Lower-case names of a module's children and own parameters; an nn.Identity (timm's absent norm) does nothing."""
    children = [
        name for name, child in module.named_children() if not isinstance(child, nn.Identity)
    ]
    return [name.lower() for name in (*children, *module._parameters)]
