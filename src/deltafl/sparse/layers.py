"""Squared gradients of single examples, layer by layer, from one pass over a batch.

A rule adds to `sums` (a module's own parameters that are wanted -> accumulators of their shapes)
the squares of each example's gradient. It gets all calls of its module in one pass, for the
gradient of an example is the sum over them, taken before squaring.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

CPU_CHUNK = 1 << 18
"""Elements of a product that is squared while it is in the second-level cache."""
CHUNK = 1 << 26
"""The same elsewhere, where few large calls are faster: 256 MB in float32."""


@dataclass(frozen=True)
class Call:
    """One call of a module: its first argument (B, ...), the others, and the gradient at its output
    (B, ...).
    """

    given: Tensor
    args: tuple[object, ...]
    kwargs: Mapping[str, object]
    grad: Tensor


Sums: TypeAlias = Mapping[str, Tensor]
Rule: TypeAlias = Callable[[nn.Module, Sequence[Call], Sums], None]


def linear(module: nn.Module, calls: Sequence[Call], sums: Sums) -> None:
    """nn.Linear on (B, ..., in)."""
    grads = _tokens([call.grad for call in calls])
    if "weight" in sums:
        _add_outer_squares(sums["weight"], grads, _tokens([call.given for call in calls]))
    if "bias" in sums:
        _add_squares(sums["bias"], grads.sum(1))


def conv2d(module: nn.Module, calls: Sequence[Call], sums: Sums) -> None:
    """nn.Conv2d on (B, C, H, W), with any stride, dilation, groups and padding: linear on patches.

    `any_module` takes 4 times as long on a ResNet.
    """
    assert isinstance(module, nn.Conv2d)
    groups = module.groups
    grads = torch.cat([call.grad.flatten(2) for call in calls], 2)
    if "weight" in sums:
        total = sums["weight"].view(module.out_channels, -1)
        size = max(1, CHUNK // max(grads.shape[2] * total.shape[1] * groups, total.numel()))
        for start in range(0, len(grads), size):
            part = slice(start, start + size)
            patches = torch.cat([_patches(module, call.given[part]) for call in calls], 2)
            if groups == 1:
                _add_outer_squares(total, grads[part].mT, patches.mT)
            else:
                left, right = (x.unflatten(1, (groups, -1)) for x in (grads[part], patches))
                _add_squares(total, left @ right.mT)
    if "bias" in sums:
        _add_squares(sums["bias"], grads.sum(2))


def norm(module: nn.Module, calls: Sequence[Call], sums: Sums) -> None:
    """LayerNorm on (..., *shape), BatchNorm in eval mode and GroupNorm on (B, C, ...): the weight's
    gradient is g times the normalised input.
    """
    for name, total in sums.items():
        gradients = []
        for call in calls:
            product = call.grad
            if name == "weight":
                plain = {
                    n: torch.full_like(p, n == "weight", dtype=product.dtype)
                    for n, p in module.named_parameters()
                }
                product = product * functional_call(module, plain, (call.given,))
            if isinstance(module, nn.LayerNorm):
                gradients.append(product.reshape(len(product), -1, *total.shape).sum(1))
            else:
                gradients.append(product.reshape(*product.shape[:2], -1).sum(2))
        _add_squares(total, torch.stack(gradients).sum(0))


def embedding(module: nn.Module, calls: Sequence[Call], sums: Sums) -> None:
    """nn.Embedding of int64 (B, ...): a row that an example looks up several times gets the sum of
    its gradients.
    """
    assert isinstance(module, nn.Embedding)
    ids = torch.cat([call.given.flatten(1) for call in calls], 1)
    grads = _tokens([call.grad for call in calls])
    keys = torch.arange(len(ids), device=ids.device)[:, None] * module.num_embeddings + ids
    pairs, place = keys.unique(return_inverse=True)
    rows = grads.new_zeros(len(pairs), grads.shape[-1])
    rows.index_add_(0, place.flatten(), grads.flatten(0, 1))
    words = pairs % module.num_embeddings
    if module.padding_idx is not None:
        rows[words == module.padding_idx] = 0
    sums["weight"].index_add_(0, words, rows.square_())


def any_module(module: nn.Module, calls: Sequence[Call], sums: Sums) -> None:
    """A module with parameters of its own, by `vmap(grad)` of this module alone.

    Attention is plain matrix products here: the fused kernels have no batching rule.
    """
    dtype = calls[0].grad.dtype
    parameters = {n: p.detach().to(dtype) for n, p in module.named_parameters()}
    wanted = {n: parameters.pop(n) for n in sums}
    size = max(1, CHUNK // sum(p.numel() for p in wanted.values()))
    gradients: list[dict[str, Tensor]] = []
    for call in calls:

        def pulled(own: dict[str, Tensor], given: Tensor, g: Tensor, call: Call = call) -> Tensor:
            args = (given[None], *call.args)
            return (functional_call(module, parameters | own, args, dict(call.kwargs))[0] * g).sum()

        with sdpa_kernel(SDPBackend.MATH):
            per_example = vmap(grad(pulled), in_dims=(None, 0, 0), chunk_size=size)
            gradients.append(per_example(wanted, call.given, call.grad))
    for name, total in sums.items():
        _add_squares(total, torch.stack([g[name] for g in gradients]).sum(0))


RULES: Mapping[type[nn.Module], Rule] = {
    nn.Linear: linear,
    nn.Conv2d: conv2d,
    nn.LayerNorm: norm,
    nn.GroupNorm: norm,
    nn.BatchNorm1d: norm,
    nn.BatchNorm2d: norm,
    nn.Embedding: embedding,
}
"""For exactly these classes, since a subclass may compute something else; `any_module` for
others.
"""


def _add_squares(total: Tensor, values: Tensor) -> None:
    """total += sum_b values[b]^2, with `values` (B, ...) of as many elements as `total` per
    example.
    """
    total.add_(values.square().sum(0).view(total.shape))


def _add_outer_squares(total: Tensor, grads: Tensor, inputs: Tensor) -> None:
    """total (o, i) += sum_b (sum_t g[b, t, :] x[b, t, :]^T)^2, with grads (B, T, o), inputs (B, T,
    i).

    The products are formed in chunks, never (B, o, i) at once. One token needs none: (g x)^2 =
    g^2 x^2. Tokens without gradient (all but the class token in the last block of a ViT) are left
    out; only the CPU looks for them, where the question needs no synchronisation.
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
    for row in range(0, total.shape[0], rows):
        part = total[row : row + rows]
        for start in range(0, len(grads), group):
            left = grads.mT[start : start + group, row : row + rows]
            product = left @ inputs[start : start + group]
            if len(product) == 1:
                part.addcmul_(product[0], product[0])
            else:
                _add_squares(part, product)


def _tokens(parts: Sequence[Tensor]) -> Tensor:
    """(B, ..., D), one for each call -> (B, T, D)."""
    return torch.cat([part.reshape(len(part), -1, part.shape[-1]) for part in parts], 1)


def _patches(conv: nn.Conv2d, images: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, C * kh * kw, L), channels first as in the weight."""
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    padded = nn.functional.pad(images, list(conv._reversed_padding_repeated_twice), mode=mode)
    if conv.kernel_size == conv.stride == (1, 1):
        return padded.flatten(2)
    return nn.functional.unfold(padded, conv.kernel_size, conv.dilation, stride=conv.stride)
