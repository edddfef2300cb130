"""Which coordinates of a model a mask may keep."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from deltafl.models.head import Head
from deltafl.models.net import Net

KEYS = {
    "k_proj": "q_proj",
    "key": "query",
    "to_k": "to_q",
    "k_lin": "q_lin",
    "wk": "wq",
}
"""What attention modules call the projections of their keys and queries: transformers, diffusers
and lucidrains, DistilBERT, plain code.
"""

ROTATIONS = ("rope", "rotary")
"""Parts of a module's name that say that keys are rotated by their positions."""

TRANSFORMS = (*ROTATIONS, "norm", "temperature", "logit_scale")
"""Parts of an attention module's own names that say that keys are more than projected."""


def eligible(net: Net) -> dict[str, Tensor]:
    """Name -> bool in the tensor's shape, on the CPU, in the order of `Net.flat`: all trained
    tensors that a mask narrows, True where it may keep the coordinate.

    Those are all but a classifier's head, which trains whole. All coordinates are eligible but the
    biases of attention keys, which are found by the structure of the modules: softmax_j(q . (k_j +
    b)) = softmax_j(q . k_j), so the bias moves no output, its gradient is rounding noise, and a
    mask of the least sensitive coordinates would take all of it. Seen are separate projections
    (`KEYS`, also with grouped queries), a fused Linear `qkv` (timm, DINO) and the `in_proj_bias` of
    nn.MultiheadAttention, of which the key's third is excluded. Keys that are normalised, rotated
    by their positions (Llama types) or joined by other keys depend on the bias; there it stays
    eligible, as it does where another module shares the parameter.
    """
    modules = list(net.module.modules())
    heads = [id(p) for m in modules if isinstance(m, Head) for p in m.parameters()]
    names = {id(p): name for name, p in trained(net).items()}
    able = {
        name: torch.ones(p.shape, dtype=torch.bool)
        for name, p in trained(net).items()
        if id(p) not in heads
    }
    uses = [id(p) for module in modules for p in module._parameters.values()]
    for bias, parts in _key_biases(net.module):
        name = names.get(id(bias))
        if name in able and uses.count(id(bias)) == 1:
            able[name].chunk(parts)[parts // 2].zero_()
    return able


def excluded(able: Mapping[str, Tensor]) -> dict[str, str]:
    """Tensor name -> why not all of it is eligible."""
    third, whole = "the key's third of a fused attention bias", "an attention key bias"
    return {
        name: f"{third if part.any() else whole}: softmax is shift-invariant"
        for name, part in able.items()
        if not part.all()
    }


def trained(net: Net) -> dict[str, nn.Parameter]:
    """The parameters that train, by their names."""
    return {n: p for n, p in net.module.named_parameters() if n in net.slices}


def _key_biases(root: nn.Module) -> Iterator[tuple[Tensor | None, int]]:
    """(bias, 3 where it is the query's, key's and value's, else 1) of each attention module whose
    keys are only projected.
    """
    if any(word in path for path, _ in root.named_modules() for word in ROTATIONS):
        return
    for module in root.modules():
        children = dict(module.named_children())  # one that is shared is there once
        if isinstance(module, nn.MultiheadAttention):
            if module.bias_k is None and not module.add_zero_attn:
                yield module.in_proj_bias, 3
            continue
        own = [n for n, child in children.items() if not isinstance(child, nn.Identity)]
        names = (*own, *module._parameters)
        if any(word in name.lower() for name in names for word in TRANSFORMS):
            continue
        for key, query in KEYS.items():
            linear = children.get(key)
            if isinstance(linear, nn.Linear) and isinstance(children.get(query), nn.Linear):
                yield linear.bias, 1
        fused = children.get("qkv")
        if isinstance(fused, nn.Linear) and fused.out_features == 3 * fused.in_features:
            yield fused.bias, 3
