"""Squared per-sample gradients of a layer's parameters, summed over the batch, from its inputs and output gradients.

Every rule adds to `sums` (relative parameter name -> accumulator of the parameter's shape; only the names wanted). A
rule is given all calls of its module in one forward pass: the per-sample gradient is their sum, taken before squaring.
"""

from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Call: TypeAlias = tuple[Tensor, Tensor]
"""Input of a layer and gradient at its output, both batch first."""
Sums: TypeAlias = dict[str, Tensor]
Rule: TypeAlias = Callable[[nn.Module, Sequence[Call], Sums], None]

CPU_CHUNK = 1 << 18
"""Elements of a product that is squared while it is in the second-level cache."""
CHUNK = 1 << 26
"""The same elsewhere, where few large calls are faster: 256 MB in float32."""


def add_squares(total: Tensor, values: Tensor) -> None:
    """total += sum_b values[b]^2, with `values` (B, *shape) of as many elements as `total` per sample."""
    if len(values) == 1:
        flat = values.reshape(total.shape)
        total.addcmul_(flat, flat)
    else:
        total.add_(values.square().sum(0).view(total.shape))


def add_outer_squares(total: Tensor, grads: Tensor, inputs: Tensor) -> None:
    """total (o, i) += sum_b (sum_t g[b, t, :] x[b, t, :]^T)^2, with grads (B, T, o) and inputs (B, T, i).

    The products are formed in chunks, never (B, o, i) at once. One token needs none: (g x)^2 = g^2 x^2. Tokens without
    gradient (all but the class token in the last block of a ViT) are left out; only the CPU looks for them, where the
    question needs no synchronisation.
    """
    if grads.is_cpu and grads.shape[1] > 1 and not grads[:, -1].any():
        used = grads.ne(0).any(2).any(0)
        grads, inputs = grads[:, used], inputs[:, used]
    if grads.shape[1] == 1:
        total.addmm_(grads[:, 0].square().mT, inputs[:, 0].square())
        return
    budget = CPU_CHUNK if grads.is_cpu else CHUNK
    rows = min(total.shape[0], max(1, budget // total.shape[1]))
    group = max(1, budget // (rows * total.shape[1]))
    left = grads.mT
    for row in range(0, total.shape[0], rows):
        part = total[row : row + rows]
        for start in range(0, len(grads), group):
            stop = start + group
            add_squares(part, left[start:stop, row : row + rows] @ inputs[start:stop])


def _sum_calls(parts: Sequence[Tensor]) -> Tensor:
    return sum(parts[1:], start=parts[0])


def _between(grad: Tensor, last: int) -> Tensor:
    """Sum over all dimensions but the batch and the last `last`: (B, ..., *shape) -> (B, *shape)."""
    dims = tuple(range(1, grad.ndim - last))
    return grad.sum(dims) if dims else grad


def _over_space(grad: Tensor) -> Tensor:
    """(B, C, ...) -> (B, C)."""
    return grad.flatten(2).sum(2) if grad.ndim > 2 else grad


def linear(module: nn.Module, calls: Sequence[Call], sums: Sums) -> None:
    """nn.Linear on (B, ..., in)."""
    if "weight" in sums:
        inputs = torch.cat([x.reshape(len(x), -1, x.shape[-1]) for x, _ in calls], 1)
        grads = torch.cat([g.reshape(len(g), -1, g.shape[-1]) for _, g in calls], 1)
        add_outer_squares(sums["weight"], grads, inputs)
    if "bias" in sums:
        add_squares(sums["bias"], _sum_calls([_between(g, 1) for _, g in calls]))


def conv2d(module: nn.Module, calls: Sequence[Call], sums: Sums) -> None:
    """nn.Conv2d on (B, C, H, W), with any stride, dilation, groups and padding: a linear layer on unfolded patches."""
    conv = cast(nn.Conv2d, module)
    if "weight" in sums:
        total, groups = sums["weight"].view(conv.out_channels, -1), conv.groups
        space = max(conv.in_channels * g.shape[2] * g.shape[3] for _, g in calls) * total.shape[1]
        step = max(1, CHUNK // max(space * groups // conv.in_channels, total.numel()))
        for start in range(0, len(calls[0][0]), step):
            patches = torch.cat([_patches(conv, x[start : start + step]) for x, _ in calls], 2)
            grads = torch.cat([g[start : start + step].flatten(2) for _, g in calls], 2)
            if groups == 1:
                add_outer_squares(total, grads.mT, patches.mT)
            else:
                per_group = grads.unflatten(1, (groups, -1)) @ patches.unflatten(1, (groups, -1)).mT
                add_squares(total, per_group)
    if "bias" in sums:
        add_squares(sums["bias"], _sum_calls([_over_space(g) for _, g in calls]))


def _patches(conv: nn.Conv2d, images: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, C * kh * kw, L), channels first as in the weight."""
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    padded = F.pad(images, list(conv._reversed_padding_repeated_twice), mode=mode)
    if conv.kernel_size == conv.stride == (1, 1):
        return padded.flatten(2)
    return F.unfold(padded, conv.kernel_size, dilation=conv.dilation, stride=conv.stride)


def layer_norm(module: nn.Module, calls: Sequence[Call], sums: Sums) -> None:
    """nn.LayerNorm: the weight's gradient is g times the normalised input."""
    norm = cast(nn.LayerNorm, module)
    shape = list(norm.normalized_shape)
    if "weight" in sums:
        products = [g * F.layer_norm(x, shape, None, None, norm.eps) for x, g in calls]
        add_squares(sums["weight"], _sum_calls([_between(p, len(shape)) for p in products]))
    if "bias" in sums:
        add_squares(sums["bias"], _sum_calls([_between(g, len(shape)) for _, g in calls]))


def channel_norm(module: nn.Module, calls: Sequence[Call], sums: Sums) -> None:
    """nn.BatchNorm in eval mode and nn.GroupNorm, on (B, C, ...)."""
    if "weight" in sums:
        products = [g * _normalised(module, x) for x, g in calls]
        add_squares(sums["weight"], _sum_calls([_over_space(p) for p in products]))
    if "bias" in sums:
        add_squares(sums["bias"], _sum_calls([_over_space(g) for _, g in calls]))


def _normalised(module: nn.Module, x: Tensor) -> Tensor:
    if isinstance(module, nn.GroupNorm):
        return F.group_norm(x, module.num_groups, None, None, module.eps)
    norm = cast(nn.BatchNorm2d, module)
    return F.batch_norm(x, norm.running_mean, norm.running_var, None, None, False, 0.0, norm.eps)


def embedding(module: nn.Module, calls: Sequence[Call], sums: Sums) -> None:
    """nn.Embedding of int64 (B, ...): a row that one sample looks up several times gets the sum of its gradients."""
    table = cast(nn.Embedding, module)
    ids = torch.cat([x.reshape(len(x), -1) for x, _ in calls], 1)
    grads = torch.cat([g.reshape(len(g), -1, g.shape[-1]) for _, g in calls], 1)
    keys = (
        torch.arange(len(ids), device=ids.device)[:, None] * table.num_embeddings + ids
    ).flatten()
    pairs, place = keys.unique(return_inverse=True)
    rows = grads.new_zeros(len(pairs), grads.shape[-1]).index_add_(0, place, grads.flatten(0, 1))
    words = pairs % table.num_embeddings
    if table.padding_idx is not None:
        rows[words == table.padding_idx] = 0
    sums["weight"].index_add_(0, words, rows.square_())


def layer_scale(module: nn.Module, calls: Sequence[Call], sums: Sums) -> None:
    """DINOv2's x * lambda1 on (B, T, D)."""
    add_squares(sums["lambda1"], _sum_calls([_between(x * g, 1) for x, g in calls]))


def token_embeddings(module: nn.Module, calls: Sequence[Call], sums: Sums) -> None:
    """transformers' (class token, patches) + positions: the gradient at the sum is the positions', per sample."""
    grad = _sum_calls([g for _, g in calls])
    for name, token in TOKENS.items():
        if name in sums:
            add_squares(sums[name], grad if token is None else grad[:, token])


TOKENS: dict[str, int | None] = {
    "cls_token": 0,
    "class_embedding": 0,
    "distillation_token": 1,
    "position_embeddings": None,
    "position_embedding.weight": None,
}
"""Parameter of an embeddings module -> the token it is added to; None: one row for every token."""

_LAYERS: dict[type[nn.Module], Rule] = {
    nn.Linear: linear,
    nn.Conv2d: conv2d,
    nn.LayerNorm: layer_norm,
    nn.GroupNorm: channel_norm,
    nn.BatchNorm1d: channel_norm,
    nn.BatchNorm2d: channel_norm,
    nn.Embedding: embedding,
}
_BY_NAME: dict[str, Rule] = {
    "ViTEmbeddings": token_embeddings,
    "DeiTEmbeddings": token_embeddings,
    "Dinov2Embeddings": token_embeddings,
    "CLIPVisionEmbeddings": token_embeddings,
    "Dinov2LayerScale": layer_scale,
}
"""Modules of transformers with parameters of their own, by class name, so that transformers is not imported."""


def rule_for(module: nn.Module) -> Rule | None:
    """The rule for exactly this class: a subclass may compute something else."""
    kind = type(module)
    if isinstance(module, nn.Embedding) and (
        module.max_norm is not None or module.scale_grad_by_freq
    ):
        return None
    return _LAYERS.get(kind) or (
        _BY_NAME.get(kind.__name__) if kind.__module__.startswith("transformers.") else None
    )


def parameters_of(module: nn.Module) -> dict[str, nn.Parameter]:
    """Name inside the module -> parameter, of those that its rule serves; none where there is no rule."""
    rule = rule_for(module)
    if rule is None:
        return {}
    if rule is token_embeddings:
        return {n: p for n, p in module.named_parameters() if n in TOKENS}
    return dict(module.named_parameters(recurse=False))


def fits(
    module: nn.Module, given: Tensor | None, output: object, batch: int, names: Sequence[str]
) -> bool:
    """Whether a call is batch first, in the shape that the module's rule expects, where `names` are wanted."""
    if not isinstance(output, Tensor) or output.ndim < 2 or len(output) != batch:
        return False
    if rule_for(module) is token_embeddings:
        positions = [attrgetter(n)(module) for n in names if TOKENS[n] is None]
        return all(p.numel() == output[0].numel() for p in positions)
    if given is None or given.ndim < 1 or len(given) != batch:
        return False
    if isinstance(module, nn.Conv2d):
        return given.ndim == 4
    return not isinstance(module, nn.LayerNorm) or given.ndim > len(module.normalized_shape)
