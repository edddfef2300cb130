"""Which coordinates of a model a mask may keep."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from deltafl.models.head import Head
from deltafl.models.net import Net

PROJECTIONS = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("to_q", "to_k", "to_v"),
    ("q_lin", "k_lin", "v_lin"),
    ("wq", "wk", "wv"),
)
"""What attention modules call their projections: transformers, diffusers and lucidrains,
DistilBERT, plain code. With grouped queries the key's is smaller.
"""

ROTATIONS = ("rope", "rotary")
"""Parts of a module's name that say that keys are rotated by their positions."""

KEY_TRANSFORMS = (*ROTATIONS, "norm", "temperature", "logit_scale")
"""Parts of an attention module's own names that say that keys are more than projected."""


@dataclass(frozen=True)
class Eligible:
    """Trained tensors in the order of `Net.flat`; True = a mask may keep the coordinate.

    shapes: the tensors that a mask narrows. partial: bool, in the tensor's shape, for those that
    are not eligible as a whole, which are attention key biases. fused: tensors whose first
    dimension holds query, key and value, in thirds. whole: shapes of the trained tensors that no
    mask narrows.
    """

    shapes: Mapping[str, tuple[int, ...]]
    partial: Mapping[str, Tensor] = field(default_factory=dict)
    fused: frozenset[str] = frozenset()
    whole: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    @property
    def excluded(self) -> dict[str, str]:
        """Tensor name -> why not all of it is eligible."""
        third, all_of_it = "the key's third of a fused attention bias", "an attention key bias"
        return {
            name: f"{third if part.any() else all_of_it}: softmax is shift-invariant"
            for name, part in self.partial.items()
        }

    def of(self, name: str) -> Tensor:
        """bool, in the tensor's shape, on the CPU."""
        if name in self.partial:
            return self.partial[name]
        return torch.ones(self.shapes[name], dtype=torch.bool)

    def numel(self, name: str) -> int:
        """Number of eligible coordinates of one tensor."""
        return int(self.of(name).sum())

    @property
    def total(self) -> int:
        """Number of eligible coordinates."""
        return sum(self.numel(name) for name in self.shapes)


def eligible(net: Net) -> Eligible:
    """All trained coordinates but those of a classifier's head, which trains whole, and the biases
    of attention keys, which are found by the structure of the modules.

    softmax_j(q . (k_j + b)) = softmax_j(q . k_j): the bias moves no output, its gradient is
    rounding noise, and a mask of the least sensitive coordinates would take all of it. Seen are
    separate projections (`PROJECTIONS`, also with grouped queries), a fused Linear `qkv` (timm,
    DINO) and the `in_proj_bias` of nn.MultiheadAttention, of which the key's third is excluded.
    Keys that are normalised, rotated by their positions (Llama types) or joined by other keys
    depend on the bias; there it stays eligible, as it does where another module shares the
    parameter.
    """
    parameters = trained(net)
    names = {id(p): n for n, p in parameters.items()}
    heads = [module for module in net.module.modules() if isinstance(module, Head)]
    whole = {id(p) for head in heads for p in head.parameters()}
    uses = [id(p) for module in net.module.modules() for p in module._parameters.values()]
    partial: dict[str, Tensor] = {}
    for bias, third in _key_biases(net.module):
        if id(bias) in names and uses.count(id(bias)) == 1:
            kept = torch.zeros(bias.shape, dtype=torch.bool)
            if third:
                kept[: len(bias) // 3] = True
                kept[2 * len(bias) // 3 :] = True
            partial[names[id(bias)]] = kept
    shapes = {n: tuple(p.shape) for n, p in parameters.items()}
    narrowed = {n: shapes[n] for n, p in parameters.items() if id(p) not in whole}
    return Eligible(
        narrowed,
        {name: partial[name] for name in narrowed if name in partial},
        frozenset(names[id(p)] for p in _fused(net.module) if id(p) in names),
        {name: shape for name, shape in shapes.items() if name not in narrowed},
    )


def trained(net: Net) -> dict[str, nn.Parameter]:
    """The parameters that train, by their names."""
    return {n: p for n, p in net.module.named_parameters() if n in net.slices}


def _key_biases(root: nn.Module) -> Iterator[tuple[Tensor, bool]]:
    """(bias, whether the key is a third of it) of each attention module whose keys are only
    projected.
    """
    if any(word in path for path, _ in root.named_modules() for word in ROTATIONS):
        return
    for module in root.modules():
        children = dict(module.named_children())
        if isinstance(module, nn.MultiheadAttention):
            joined = module.bias_k is not None or module.add_zero_attn
            if module.in_proj_bias is not None and not joined:
                yield module.in_proj_bias, True
            continue
        own = [n for n, child in children.items() if not isinstance(child, nn.Identity)]
        own = [name.lower() for name in (*own, *module._parameters)]
        if any(word in name for name in own for word in KEY_TRANSFORMS):
            continue
        for triple in PROJECTIONS:
            parts = [children.get(name) for name in triple]  # one that is shared is there once
            linears = [part for part in parts if isinstance(part, nn.Linear)]
            if len(linears) == 3 and linears[1].bias is not None:
                yield linears[1].bias, False
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
    """The fused projection of an attention module in timm's layout, (query, key, value) in the
    outputs.
    """
    linear = dict(module.named_children()).get("qkv")
    if isinstance(linear, nn.Linear) and linear.out_features == 3 * linear.in_features:
        return linear
    return None
