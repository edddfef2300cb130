"""Squared gradients of single examples, layer by layer, from one pass over a batch.

A rule adds to `sums` (a module's own parameters that are wanted -> accumulators of their shapes)
the squares of each example's gradient.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

CPU_CHUNK = 1 << 18
"""Elements of products that are squared while they are in the second-level cache."""
CHUNK = 1 << 26
"""The same elsewhere, where few large calls are faster: 256 MB in float32."""


@dataclass(frozen=True)
class Call:
    """One call of a module: its first argument (B, ...), the others, and the gradient at its output
    (B, ...).
    """

    module: nn.Module
    given: Tensor
    args: tuple[object, ...]
    kwargs: Mapping[str, object]
    grad: Tensor


Sums: TypeAlias = Mapping[str, Tensor]


def apply_rule(call: Call, sums: Sums) -> None:
    """Add what the rule of the call's module finds.

    Rules are for exactly these classes, since a subclass may compute something else.
    """
    rules = {nn.Linear: linear, nn.Conv2d: conv2d, nn.Embedding: embedding}
    rules.get(type(call.module), any_module)(call, sums)


def linear(call: Call, sums: Sums) -> None:
    """nn.Linear on (B, ..., in)."""
    given, grads = (x.reshape(len(x), -1, x.shape[-1]) for x in (call.given, call.grad))
    if "weight" in sums:
        _add_products(sums["weight"], grads.mT, given)
    if "bias" in sums:
        _add_squares(sums["bias"], grads.sum(1))


def conv2d(call: Call, sums: Sums) -> None:
    """nn.Conv2d on (B, C, H, W), padded with zeros by numbers: linear on patches, in groups.

    `any_module` takes 4 times as long on a ResNet.
    """
    module = call.module
    assert isinstance(module, nn.Conv2d)
    if module.padding_mode != "zeros" or isinstance(module.padding, str):
        any_module(call, sums)
        return
    area = module.kernel_size[0] * module.kernel_size[1]
    size = max(1, CHUNK // (module.in_channels * area * call.grad[0, 0].numel()))
    unfold = nn.Unfold(module.kernel_size, module.dilation, module.padding, module.stride)
    for images, grads in zip(call.given.split(size), call.grad.flatten(2).split(size), strict=True):
        if "weight" in sums:
            left, right = (x.unflatten(1, (module.groups, -1)) for x in (grads, unfold(images)))
            total = sums["weight"].view(module.groups, -1, right.shape[2])
            _add_products(total, left, right.mT)
        if "bias" in sums:
            _add_squares(sums["bias"], grads.sum(2))


def embedding(call: Call, sums: Sums) -> None:
    """nn.Embedding of int64 (B, ...): a row that an example looks up several times gets the sum of
    its gradients.
    """
    module = call.module
    assert isinstance(module, nn.Embedding)
    ids, grads = call.given.flatten(1), call.grad.flatten(1, -2)
    keys = torch.arange(len(ids), device=ids.device)[:, None] * module.num_embeddings + ids
    pairs, place = keys.unique(return_inverse=True)
    rows = grads.new_zeros(len(pairs), grads.shape[-1])
    rows.index_add_(0, place.flatten(), grads.flatten(0, 1))
    words = pairs % module.num_embeddings
    if module.padding_idx is not None:
        rows[words == module.padding_idx] = 0
    sums["weight"].index_add_(0, words, rows.square_())


def any_module(call: Call, sums: Sums) -> None:
    """A module with parameters of its own, by `vmap(grad)` of this module alone.

    Attention is plain matrix products here: the fused kernels have no batching rule.
    """
    parameters = {n: p.detach().to(call.grad.dtype) for n, p in call.module.named_parameters()}
    wanted = {n: parameters[n] for n in sums}
    size = max(1, CHUNK // sum(p.numel() for p in wanted.values()))

    def pulled(own: dict[str, Tensor], given: Tensor, g: Tensor) -> Tensor:
        args = (given[None], *call.args)
        return (
            functional_call(call.module, parameters | own, args, dict(call.kwargs))[0] * g
        ).sum()

    for given, grads in zip(call.given.split(size), call.grad.split(size), strict=True):
        with sdpa_kernel(SDPBackend.MATH):
            gradients = vmap(grad(pulled), in_dims=(None, 0, 0))(wanted, given, grads)
        for name, total in sums.items():
            _add_squares(total, gradients[name])


def _add_squares(total: Tensor, values: Tensor) -> None:
    """total += sum_b values[b]^2, with `values` (B, *total.shape)."""
    total.add_(values.square().sum(0))


def _add_products(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total (..., o, i) += sum_b (left[b] @ right[b])^2, with left (B, ..., o, T) and right
    (B, ..., T, i).

    The products are formed in chunks, never (B, o, i) at once. One token needs none: (g x)^2 =
    g^2 x^2.
    """
    if left.shape[-1] == 1:
        total.add_(left[..., 0].movedim(0, -1).square() @ right[..., 0, :].movedim(0, -2).square())
        return
    size = max(1, (CPU_CHUNK if total.is_cpu else CHUNK) // total.numel())
    for a, b in zip(left.split(size), right.split(size), strict=True):
        _add_squares(total, a @ b)
