"""One forward and one backward pass that give every layer its inputs and per-sample output gradients."""

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from deltafl.errors import DeltaflError
from deltafl.sparse.per_sample import CHUNK, Rule, Sums, add_squares, fits, parameters_of, rule_for

Target: TypeAlias = tuple[Tensor, Tensor]
"""int64 labels (B,) and the weight of each squared gradient (B,)."""
Choose: TypeAlias = Callable[[Tensor], Sequence[Target]]
"""Logits (B, K) -> the targets whose squared gradients are summed."""
Names: TypeAlias = Mapping[str, str]
"""Name inside a module -> name of the parameter in the whole net."""
PROBES = (2, 3)
"""Batch sizes of the probes: a dimension that follows both is the batch."""


@dataclass(frozen=True)
class Plan:
    """Layers that the fast path serves: module path -> its parameters, and how often it is called in one pass."""

    layers: Mapping[str, Names]
    calls: Mapping[str, int]

    @property
    def covered(self) -> set[str]:
        """The parameters served."""
        return {name for names in self.layers.values() for name in names.values()}


def make_plan(net: nn.Module, inputs: Tensor, wanted: Collection[str]) -> Plan:
    """Which of the parameters `wanted` have per-sample gradients that a rule knows; nothing of `net` is changed.

    A parameter is covered where each of its uses in the autograd graph is a call of the module with its rule, and
    where all calls are batch first. A weight read elsewhere, tied to another layer or used by a call on (B * T, ...)
    is not. `inputs` (n >= 1, ...) are examples.
    """
    found: dict[str, Names] = {}
    claimed: set[str] = set()
    of = {id(p): name for name, p in net.named_parameters()}
    for path, module in net.named_modules():
        names = {n: of[id(p)] for n, p in parameters_of(module).items()}
        names = {n: full for n, full in names.items() if full in wanted}
        if names:
            found[path] = names
    probes = [
        _probe(net, inputs[torch.arange(size) % len(inputs)], found, wanted) for size in PROBES
    ]
    layers: dict[str, Names] = {}
    for path, names in found.items():
        names = {
            n: full
            for n, full in names.items()
            if full not in claimed and all(0 < calls[path] == uses[full] for calls, uses in probes)
        }
        if names:
            layers[path] = names
            claimed.update(names.values())
    return Plan(layers, {path: probes[0][0][path] for path in layers})


def _probe(
    net: nn.Module, inputs: Tensor, layers: Mapping[str, Names], wanted: Collection[str]
) -> tuple[dict[str, int], Counter[str]]:
    """Calls of each layer, -1 where one does not fit its rule; and uses of each parameter in the autograd graph."""
    calls = dict.fromkeys(layers, 0)
    kept: list[tuple[str, Tensor, int]] = []

    def record(path: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        given = _first(args, kwargs)
        good = fits(module, given, output, len(inputs), tuple(layers[path])) and calls[path] >= 0
        calls[path] = calls[path] + 1 if good else -1
        if given is not None:
            kept.append((path, given, given._version))

    parameters = {n: p.detach() for n, p in net.named_parameters()}
    for name in wanted:
        parameters[name].requires_grad_()
    with _hooks(net, {path: partial(record, path) for path in layers}), torch.enable_grad():
        logits = functional_call(net, parameters, (inputs,))
    for path, given, version in kept:
        if given._version != version:
            calls[path] = -1
    names = {id(p): n for n, p in parameters.items()}
    uses: Counter[str] = Counter()
    seen, stack = set(), [logits.grad_fn]
    while stack:
        for node, _ in stack.pop().next_functions:
            if node is None:
                continue
            if hasattr(node, "variable"):
                uses[names.get(id(node.variable), "")] += 1
            elif node not in seen:
                seen.add(node)
                stack.append(node)
    return calls, uses


@dataclass
class _Layer:
    """Inputs and output gradients of one module, until all calls of a pass are known."""

    module: nn.Module
    rule: Rule
    sums: Sums
    calls: list[tuple[Tensor, list[Tensor]]] = field(default_factory=list)

    def receive(self, gradients: list[Tensor], gradient: Tensor) -> None:
        gradients.append(gradient)
        if all(g for _, g in self.calls):
            self.flush()

    def flush(self) -> None:
        """Add the squares of what has arrived; a call without gradient has no influence."""
        arrived = [(x, g[0]) for x, g in self.calls if g]
        if arrived:
            self.rule(self.module, arrived, self.sums)
        for _, gradients in self.calls:
            gradients.clear()


def add_fast(
    net: nn.Module, plan: Plan, inputs: Tensor, choose: Choose, sums: Sums
) -> Sequence[Target]:
    """Add sum_b w_b (d log p(y_b | x_b) / d theta)^2 of the covered parameters to `sums`; returns the targets.

    One backward pass of sum_b sqrt(w_b) log p(y_b | x_b) for each target gives all per-sample output gradients, since
    samples do not meet. The parameters take part without gradient, so that autograd computes input gradients alone.

    Raises:
        DeltaflError: a module is not called as often as in the plan.
    """
    layers: dict[str, _Layer] = {}
    leaves: list[Tensor] = []

    def record(
        layer: _Layer, module: nn.Module, args: Any, kwargs: Any, output: Tensor
    ) -> Tensor | None:
        replaced = None
        if not output.requires_grad:
            leaves.append(output.detach().requires_grad_())
            output = replaced = leaves[
                -1
            ].clone()  # a leaf itself could not be changed in place by what follows
        given = _first(args, kwargs)
        gradients: list[Tensor] = []
        layer.calls.append((output.detach() if given is None else given.detach(), gradients))
        output.register_hook(partial(layer.receive, gradients))
        return replaced

    for path, names in plan.layers.items():
        module = net.get_submodule(path)
        rule = rule_for(module)
        assert rule is not None
        layers[path] = _Layer(module, rule, {n: sums[full] for n, full in names.items()})
    parameters = {n: p.detach() for n, p in net.named_parameters()}
    with (
        _hooks(net, {path: partial(record, layer) for path, layer in layers.items()}),
        torch.enable_grad(),
    ):
        logits = functional_call(net, parameters, (inputs,))
        log_p = logits.log_softmax(1)
    for path, layer in layers.items():
        if len(layer.calls) != plan.calls[path]:
            raise DeltaflError(
                f'module "{path}" is called {plan.calls[path]} times for one batch and {len(layer.calls)} for another; '
                "use reference_fisher for a model that chooses its layers by its input"
            )
    targets = choose(logits.detach())
    if leaves and log_p.requires_grad:
        for i, (labels, weights) in enumerate(targets, 1):
            with torch.enable_grad():
                total = (log_p.gather(1, labels[:, None])[:, 0] * weights.sqrt()).sum()
            torch.autograd.grad(total, leaves, retain_graph=i < len(targets), allow_unused=True)
            for layer in layers.values():
                layer.flush()
    return targets


def add_by_vmap(net: nn.Module, inputs: Tensor, targets: Sequence[Target], sums: Sums) -> None:
    """The same for all parameters named in `sums`, by `vmap(grad)`: any layer, but slow and large.

    Attention is plain matrix products here: the fused kernels have no batching rule.
    """
    held = {n: p.detach() for n, p in net.named_parameters()}
    scored = {n: held.pop(n) for n in sums}

    def log_p(parameters: dict[str, Tensor], x: Tensor, label: Tensor) -> Tensor:
        logits = functional_call(net, {**held, **parameters}, (x[None],))
        return logits.log_softmax(1)[0].gather(0, label[None])[0]

    per_sample = vmap(grad(log_p), in_dims=(None, 0, 0))
    size = max(1, CHUNK // max(1, sum(math.prod(p.shape) for p in scored.values())))
    for labels, weights in targets:
        for x, y, w in zip(
            inputs.split(size), labels.split(size), weights.split(size), strict=True
        ):
            with sdpa_kernel(SDPBackend.MATH):
                gradients = per_sample(scored, x, y)
            for name, gradient in gradients.items():
                add_squares(sums[name], gradient * w.sqrt().view(-1, *[1] * (gradient.ndim - 1)))


def _first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    first = next(iter((*args, *kwargs.values())), None)
    return first if isinstance(first, Tensor) else None


@contextmanager
def _hooks(net: nn.Module, hooks: Mapping[str, Callable[..., Any]]) -> Iterator[None]:
    """Forward hooks on the modules named, removed on the way out."""
    handles = [
        net.get_submodule(p).register_forward_hook(hook, with_kwargs=True)
        for p, hook in hooks.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
