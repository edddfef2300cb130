"""Clients that train a LoRA: the server combines their products, and chooses the rank sent down.

A mean of A and a mean of B multiply to another matrix than the mean of the products B A (methods of
FedIT, arXiv 2305.05644). Here a delta is the product, as in a merge, so that every rule is right;
what a round's result loses is what its nearest LoRA lacks, which is dropped (svd) or added to the
frozen weights (residual, as FedEx-LoRA, arXiv 2410.09432). With A the same for all and frozen
(frozen_a, FFA-LoRA, arXiv 2403.12313) the mean of B is that of the products already.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import hypot

import torch
from torch import Tensor

from deltafl.algebra.aggregate import Aggregate
from deltafl.algebra.deltas import Update
from deltafl.algebra.low_rank import LowRank, nearest
from deltafl.algebra.tensors import Joined, Spec, Tensors
from deltafl.federated.server import ServerRecipe, ServerState, server_step
from deltafl.models.adapter import lora_layers
from deltafl.models.net import Net
from deltafl.rules.weights import shares
from deltafl.training.record import Row


@dataclass(frozen=True)
class Factors:
    """A LoRA beside a weight: what the server's parameters A (r, in), B (out, r) and the weight
    itself, (out, in) or transposed, are called, and the factor of B A.
    """

    a: str
    b: str
    weight: str
    scale: float
    transposed: bool

    def of(self, params: Tensors) -> tuple[Tensor, Tensor]:
        """scale B, and A."""
        return self.scale * params[self.b], params[self.a]


def factors_of(net: Net) -> dict[str, Factors]:
    """Name of each weight with a LoRA in the base's files -> its factors."""
    found = {}
    for name, layer in lora_layers(net).items():
        a, b, weight = (
            net.file_name(f"{name}.{part}.weight")
            for part in ("lora_A.default", "lora_B.default", "base_layer")
        )
        scale, transposed = layer.scaling["default"], layer.fan_in_fan_out
        found[net.file_name(f"{name}.weight")] = Factors(a, b, weight, scale, transposed)
    return found


def as_products(loras: Mapping[str, Factors], params: Tensors, update: Update) -> Update:
    """An update of A and B as one of the weights: scale (B' A' - B A), of twice the rank."""
    delta, parts = update.delta, {name for one in loras.values() for name in (one.a, one.b)}
    specs, pairs = dict[str, Spec](), dict[str, tuple[Tensor, Tensor]]()
    for name, one in loras.items():
        b, a = one.of(params)
        new_b, new_a = one.of({n: params[n] + delta[n] for n in (one.a, one.b)})
        pairs[name] = torch.cat([new_b, -b], 1), torch.cat([new_a, a])
        specs[name] = Spec((len(b), a.shape[1]), b.dtype, b.device)
    products = LowRank(specs, pairs.get)
    places = {name: (products, name) for name in specs}
    return Update(
        Joined(places | {name: (delta, name) for name in delta if name not in parts}),
        update.source,
    )


def lora_step(
    state: ServerState,
    update: Aggregate,
    recipe: ServerRecipe,
    trained: set[str],
    loras: Mapping[str, Factors],
) -> tuple[ServerState, Row]:
    """`server_step` on the products, and of what it gives the nearest LoRA; what that lacks is
    added to the weight where the server's parameters hold it.

    Returns also `lora_error`: the norm of what was dropped or so added, relative to the products'.
    """
    apart = {name for one in loras.values() for name in (one.a, one.b, one.weight)}
    rest = {name: tensor for name, tensor in state.params.items() if name not in apart}
    products = {name: torch.mm(*one.of(state.params)) for name, one in loras.items()}
    stepped = server_step(
        replace(state, params=products | rest), update, recipe, {*products} | (trained - apart)
    )
    params, norms, errors = {**state.params}, list[float](), list[float]()
    for name, tensor in stepped.params.items():
        if name not in loras:
            params[name] = tensor
            continue
        one, before = loras[name], state.params[loras[name].a]
        b, a, norm, error = nearest(tensor / one.scale, None, len(before))
        a = torch.where(b.any(0)[:, None], a, before)  # else neither side would have a gradient
        params[one.b], params[one.a] = (side.to(before.dtype).contiguous() for side in (b, a))
        if one.weight in params:
            lost = tensor - torch.mm(*one.of(params))
            params[one.weight] = params[one.weight] + (lost.mT if one.transposed else lost)
        norms.append(norm * one.scale)
        errors.append(norm * one.scale * error)
    total = hypot(*norms)
    return replace(stepped, params=params), {"lora_error": hypot(*errors) / total if total else 0.0}


def naive_error(
    loras: Mapping[str, Factors], params: Tensors, update: Aggregate, updates: Sequence[Update]
) -> float:
    """How far off the mean of A times that of B would be: the norm of its difference from the mean
    of products, relative to what that has changed. The mean is the rule's, if that is linear.
    """
    wrong, right = 0.0, 0.0
    for name, one in loras.items():
        terms = update.terms(name)
        p = torch.tensor(shares([c for c, _ in terms] if terms else update.weights["*"])).double()
        sides = [one.of({n: params[n] + u.delta[n] for n in (one.a, one.b)}) for u in updates]
        b, a = (torch.stack(side).double() for side in zip(*sides, strict=True))
        p = p.to(b.device)[:, None, None]
        means, before = ((p * b).sum(0), (p * a).sum(0)), one.of(params)
        wrong += _square(p * b, a, *means)
        right += _square(p * b, a, *(side.double() for side in before))
    return (wrong / right) ** 0.5 if right else 0.0


def _square(b: Tensor, a: Tensor, other_b: Tensor, other_a: Tensor) -> float:
    """||sum_t B_t A_t - B A||^2, from r x r matrices: no product is made."""
    left = torch.cat([*b, -other_b], 1)
    right = torch.cat([*a, other_a])
    return max(0.0, float((left.mT @ left * (right @ right.mT)).sum()))
