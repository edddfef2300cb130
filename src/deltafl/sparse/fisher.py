"""Sensitivity of a model's parameters: the diagonal of the Fisher information (arXiv 1612.00796, 2105.08502)."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn

from deltafl.errors import DeltaflError, did_you_mean
from deltafl.models.encoder import LoadedEncoder
from deltafl.models.flat import FlatModel
from deltafl.models.heads import LinearHead
from deltafl.sparse.capture import Plan, Target, add_by_vmap, add_fast, make_plan
from deltafl.tasks.arrays import Split

Labels: TypeAlias = Literal["sampled", "empirical", "exact"]


@dataclass(frozen=True)
class FisherSum:
    """sum_i E_y[(d log p(y | x_i) / d theta)^2] by module names, in each parameter's shape, over `count` examples.

    Sums of disjoint data add up to the sum of their union, up to rounding: clients send this, the server adds.
    """

    sum: Mapping[str, Tensor]
    count: int

    def __add__(self, other: "FisherSum") -> "FisherSum":
        """Raises DeltaflError if the two are of different models."""
        if {n: t.shape for n, t in self.sum.items()} != {n: t.shape for n, t in other.sum.items()}:
            raise DeltaflError(
                "two Fisher sums have different names or shapes; are they of the same model?"
            )
        return FisherSum(
            {n: t + other.sum[n] for n, t in self.sum.items()}, self.count + other.count
        )

    def mean(self) -> dict[str, Tensor]:
        """F = sum / count. Raises DeltaflError where nothing was counted."""
        if not self.count:
            raise DeltaflError("a Fisher sum over no examples has no mean; give at least one id")
        return {n: t / self.count for n, t in self.sum.items()}


def diagonal_fisher(
    model: FlatModel,
    head: LinearHead,
    split: Split,
    ids: Tensor,
    *,
    labels: Labels = "sampled",
    draws: int = 1,
    generator: torch.Generator | None = None,
    batch_size: int = 64,
) -> FisherSum:
    """Sum over the examples at `ids` of E_y[(d log p(y | x_i) / d theta_j)^2], of per-sample gradients.

    theta is the trainable part of the encoder, p the softmax of the frozen head's logits, in eval mode. `labels`:
    "sampled" averages over `draws` labels y ~ p(. | x_i), drawn with `generator` (CPU) independently of the batch size;
    "empirical" takes the split's labels; "exact" sums over all classes, with one backward pass for each. `ids` int64
    (n,). The result is float32 on the model's device, in the order of `model.tensors()`; batches are summed in float64.
    Layers without a rule in `per_sample` go through `vmap(grad)`. Values, gradients, modes and hooks of the model stay
    as they are.

    Raises:
        DeltaflError: unknown `labels`, no generator, draws or batch_size < 1, a head that does not fit, or batch norm
            without running statistics, which mixes examples.
    """
    return encoder_fisher(model.encoder, head, split, ids, labels, draws, generator, batch_size)


def reference_fisher(
    model: FlatModel,
    head: LinearHead,
    split: Split,
    ids: Tensor,
    *,
    labels: Labels = "sampled",
    draws: int = 1,
    generator: torch.Generator | None = None,
    batch_size: int = 64,
) -> FisherSum:
    """What `diagonal_fisher` computes, by `vmap(grad)` alone: slower, and independent of every rule."""
    return encoder_fisher(
        model.encoder, head, split, ids, labels, draws, generator, batch_size, fast=False
    )


def encoder_fisher(
    encoder: LoadedEncoder,
    head: LinearHead,
    split: Split,
    ids: Tensor,
    labels: Labels,
    draws: int,
    generator: torch.Generator | None,
    batch_size: int,
    fast: bool = True,
) -> FisherSum:
    """`diagonal_fisher` of an encoder in its own dtype, which may be float64."""
    _check(encoder, head, split, ids, labels, draws, generator, batch_size)
    net = _Classifier(encoder, head)
    named = {
        n: p for n, p in net.encoder.named_parameters() if p.requires_grad and p.is_floating_point()
    }
    totals = {
        n: torch.zeros_like(p, dtype=torch.float64, requires_grad=False) for n, p in named.items()
    }
    sums = {f"encoder.{n}": torch.zeros_like(p, requires_grad=False) for n, p in named.items()}
    uniform = (
        torch.rand(len(ids), draws, dtype=torch.float64, generator=generator)
        if labels == "sampled"
        else None
    )
    plan: Plan | None = None if fast else Plan({}, {})
    with _eval_mode(net), torch.no_grad():
        for positions in torch.arange(len(ids)).split(batch_size) if len(ids) else ():
            inputs, given = net.batch(split, ids[positions])
            if plan is None:
                plan = make_plan(net, inputs, sums.keys())

            def choose(
                logits: Tensor, rows: Tensor = positions, given: Tensor = given
            ) -> Sequence[Target]:
                return _targets(logits, given, labels, None if uniform is None else uniform[rows])

            for part in sums.values():
                part.zero_()
            targets = add_fast(net, plan, inputs, choose, sums)
            rest = {n: part for n, part in sums.items() if n not in plan.covered}
            if rest:
                add_by_vmap(net, inputs, targets, rest)
            for name, total in totals.items():
                total.add_(sums[f"encoder.{name}"])
    return FisherSum({n: t.to(named[n].dtype) for n, t in totals.items()}, len(ids))


class _Classifier(nn.Module):
    """Normalised images -> logits; only the encoder has parameters."""

    def __init__(self, encoder: LoadedEncoder, head: LinearHead) -> None:
        super().__init__()
        self.encoder = encoder.module
        self.loaded = encoder
        one = next(p for p in encoder.module.parameters() if p.is_floating_point())
        self.device, self.dtype = one.device, one.dtype
        self.head = replace(
            head, weight=head.weight.detach().to(one), bias=head.bias.detach().to(one)
        )

    def batch(self, split: Split, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs and labels of the examples at `ids`, on the encoder's device."""
        images, labels = split.at(ids, self.device)
        return self.loaded.input.normalise(images).to(self.dtype), labels

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head.logits(self.loaded.embed(self.encoder, inputs))


def _targets(logits: Tensor, given: Tensor, labels: Labels, uniform: Tensor | None) -> list[Target]:
    """Labels (B,) and weights (B,), one pair for each backward pass; `uniform` (B, draws) in [0, 1) draws labels."""
    one = torch.ones_like(logits[:, 0])
    p = logits.softmax(1)
    if labels == "empirical":
        return [(given, one)]
    if labels == "exact":
        return [(torch.full_like(given, k), p[:, k]) for k in range(p.shape[1])]
    assert uniform is not None
    below = p.double().cumsum(1)
    drawn = torch.searchsorted(below, uniform.to(below.device) * below[:, -1:], right=True).clamp(
        max=p.shape[1] - 1
    )
    return [(drawn[:, r], one / drawn.shape[1]) for r in range(drawn.shape[1])]


def _check(
    encoder: LoadedEncoder,
    head: LinearHead,
    split: Split,
    ids: Tensor,
    labels: Labels,
    draws: int,
    generator: torch.Generator | None,
    batch_size: int,
) -> None:
    known = get_args(Labels)
    if labels not in known:
        raise DeltaflError(f'unknown Fisher labels "{labels}"; {did_you_mean(labels, known)}')
    if labels == "sampled" and generator is None:
        raise DeltaflError(
            'Fisher labels "sampled" need a generator; give one, or labels="empirical"'
        )
    if draws < 1 or batch_size < 1:
        raise DeltaflError(
            f"Fisher needs draws >= 1 and batch_size >= 1, not {draws} and {batch_size}"
        )
    if head.feature_dim != encoder.feature_dim:
        raise DeltaflError(
            f"the head takes {head.feature_dim} features, the model gives {encoder.feature_dim}; "
            "was it made with another model?"
        )
    classes = len(head.class_names)
    if (
        labels == "empirical"
        and len(ids)
        and int(split.labels[ids.to(split.labels.device)].max()) >= classes
    ):
        raise DeltaflError(
            f"the split has labels beyond the head's {classes} classes; is the head another task's?"
        )
    for name, module in encoder.module.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None:
            raise DeltaflError(
                f'batch norm "{name}" has no running statistics, so that examples have no gradients of their own; '
                "build it with track_running_stats=True"
            )


@contextmanager
def _eval_mode(module: nn.Module) -> Iterator[None]:
    """Every submodule in eval mode, each back in its own mode on the way out."""
    modes = {m: m.training for m in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for each, training in modes.items():
            each.training = training
