"""Squared gradients of the loss of single examples: by layers where that is right, else one by
one.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.func import functional_call

from deltafl.models.net import Net
from deltafl.sparse.layers import RULES, Call, any_module
from deltafl.tasks.task import Batch, Model, Task

Layers: TypeAlias = Mapping[str, Mapping[str, str]]
"""Module path -> name of a parameter in the module -> its name in the net."""

CHECKED = 2
"""Examples on which a layer must give what autograd gives; two, for one has no order of
examples.
"""
TOLERANCE = 1e-3
"""Relative to a tensor's largest score, beyond rounding in float32."""
NOISE = 1e-12
"""Relative to the model's largest score: less is the square of rounding."""


def find_layers(net: Net, task: Task, batch: Batch, wanted: Mapping[str, Tensor]) -> Layers:
    """The layers that on `CHECKED` examples of a batch give the scores of autograd; `wanted`: name
    -> a tensor like the scores.

    That leaves out weights that are tied or read elsewhere, examples that are not the first
    dimension of a call, inputs that are changed in place, and modules that vmap cannot trace.
    """
    rows = torch.arange(CHECKED, device=net.device) % len(next(iter(batch.values())))
    batch = {name: tensor[rows] for name, tensor in batch.items()}
    names = {id(p): n for n, p in net.module.named_parameters() if n in wanted}
    layers = {
        path: {n: names[id(p)] for n, p in module._parameters.items() if id(p) in names}
        for path, module in net.module.named_modules()
    }
    layers = {path: own for path, own in layers.items() if own}
    expected, found = ({n: torch.zeros_like(t) for n, t in wanted.items()} for _ in range(2))
    _add_by_autograd(net, task, batch, expected)
    calls = _Calls(CHECKED)
    try:
        served = add_by_layers(net, task, batch, layers, found, checked=calls)[0]
    except Exception:  # one row for all examples that cannot be broadcast when each has a copy
        layers = {path: own for path, own in layers.items() if path not in calls.copied}
        calls = _Calls(CHECKED)
        served = add_by_layers(net, task, batch, layers, found, checked=calls)[0]
    noise = NOISE * max(float(t.max()) for t in expected.values() if t.numel())
    errors = {n: (found[n] - expected[n]).abs() for n in served}
    right = {n for n in served if bool((errors[n] <= TOLERANCE * expected[n].max() + noise).all())}
    layers = {p: {n: f for n, f in own.items() if f in right} for p, own in layers.items()}
    return {path: own for path, own in layers.items() if own}


class _Calls:
    """Forward hooks that note what layers are given in a pass over `size` examples.

    `copied`: the layers with one output for all examples (positions), of which each gets a copy.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.of: dict[str, list[tuple[Callable[..., Call], GradientEdge]]] = {}
        self.odd: set[str] = set()
        self.copied: set[str] = set()

    def record(self, path: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        """Note a call whose first argument and output have the examples first, or one for all."""
        pair = [t for t in (*args[:1], output) if isinstance(t, Tensor) and t.ndim]
        if len(pair) < 2 or any(len(t) not in (1, self.size) for t in pair):
            self.odd.add(path)
            return output
        given = pair[0].detach().expand(self.size, *pair[0].shape[1:])
        if len(output) != self.size:
            self.copied.add(path)
            output = output.expand(self.size, *output.shape[1:]).clone()
        if not output.requires_grad:  # a leaf itself could not be changed in place by what follows
            output = output.detach().requires_grad_().clone()
        make = partial(Call, given, args[1:], kwargs)
        self.of.setdefault(path, []).append((make, get_gradient_edge(output)))
        return output


def add_by_layers(
    net: Net,
    task: Task,
    batch: Batch,
    layers: Layers,
    sums: Mapping[str, Tensor],
    draw: Callable[[Model, Batch], Batch] | None = None,
    checked: _Calls | None = None,
) -> tuple[set[str], Batch]:
    """Add the squared gradients of each example of a batch, with targets from `draw`, to `sums`.

    One backward pass of the summed losses gives the gradients at all layers' outputs of every
    example, since examples do not meet. Parameters take part without gradient, so that autograd
    computes input gradients alone. Returns the names that were served, those of layers that were
    called on the whole batch, and the batch with its targets. checked: rules that fail are left
    out.
    """
    calls = checked or _Calls(len(next(iter(batch.values()))))
    modules = {path: net.module.get_submodule(path) for path in layers}
    hooks = [
        module.register_forward_hook(partial(calls.record, path), with_kwargs=True)
        for path, module in modules.items()
    ]
    model = _Once(net)
    try:
        with torch.enable_grad():
            batch = batch if draw is None else draw(model, batch)
            loss = task.loss(model, batch)[0].sum()
    finally:
        for hook in hooks:
            hook.remove()
    edges = [edge for pairs in calls.of.values() for _, edge in pairs]
    grads = iter(torch.autograd.grad(loss, edges, allow_unused=True) if edges else ())
    served: set[str] = set()
    for path, pairs in calls.of.items():
        found = [(make, next(grads)) for make, _ in pairs]
        made = [make(grad) for make, grad in found if grad is not None]
        rule = RULES.get(type(modules[path]), any_module)
        if path in calls.odd:
            continue
        try:
            if made:
                rule(modules[path], made, {n: sums[full] for n, full in layers[path].items()})
            served.update(layers[path].values())
        except Exception:
            if checked is None:
                raise
    return served, batch


def add_by_example(net: Net, task: Task, batch: Batch, sums: Mapping[str, Tensor]) -> None:
    """The same by ordinary autograd, one example at a time: any model, but slow."""
    for i in range(len(next(iter(batch.values())))):
        one = {name: tensor[i : i + 1] for name, tensor in batch.items()}
        _add_by_autograd(net, task, one, sums)


def _add_by_autograd(net: Net, task: Task, batch: Batch, sums: Mapping[str, Tensor]) -> None:
    """By a backward pass for each example of one forward pass."""
    model = _Once(net, sums)
    wanted = [model.tensors[n] for n in sums]
    with torch.enable_grad():
        losses = task.loss(model, batch)[0].unbind()
    for loss in losses:
        grads = torch.autograd.grad(loss, wanted, retain_graph=True, allow_unused=True)
        for total, gradient in zip(sums.values(), grads, strict=True):
            if gradient is not None:
                total.addcmul_(gradient, gradient)


class _Once:
    """A net's module with parameters of its own, at least float32, of which `trained` have
    gradients.

    The output is that of the first call: a task that draws targets from it and then takes the loss
    with these targets asks for the same twice.
    """

    def __init__(self, net: Net, trained: Mapping[str, Tensor] | None = None) -> None:
        self._module = net.module
        self._output: Any = None
        held = (*net.module.named_parameters(), *net.module.named_buffers())
        self.tensors = {
            n: t.detach().to(torch.promote_types(t.dtype, torch.float32))
            for n, t in held
            if t.is_floating_point()
        }
        for name in trained or ():
            self.tensors[name].requires_grad_()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._output is None:
            self._output = functional_call(self._module, self.tensors, args, kwargs)
        return self._output
