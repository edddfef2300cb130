"""Squared gradients of the loss of single examples: by layers where that is right, else one by one."""

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
"""Examples on which a layer must give what autograd gives; two, for one has no order of examples."""
TOLERANCE = 1e-3
"""Relative to a tensor's largest score, beyond rounding in float32."""
NOISE = 1e-12
"""Relative to the model's largest score: less is the square of rounding."""


def find_layers(net: Net, task: Task, batch: Batch, wanted: Mapping[str, Tensor]) -> Layers:
    """The layers that on `CHECKED` examples of a batch give the scores of autograd; `wanted`: name ->
    a tensor like the scores.

    That leaves out weights that are tied or read elsewhere, examples that are not the first
    dimension of a call, inputs that are changed in place, and modules that vmap cannot trace.
    """
    rows = torch.arange(CHECKED, device=net.device) % len(next(iter(batch.values())))
    batch = {name: tensor[rows] for name, tensor in batch.items()}
    names = {id(p): n for n, p in net.module.named_parameters() if n in wanted}
    layers: dict[str, dict[str, str]] = {}
    for path, module in net.module.named_modules():
        own = {n: names[id(p)] for n, p in module._parameters.items() if id(p) in names}
        if own:
            layers[path] = own
    expected, found = ({n: torch.zeros_like(t) for n, t in wanted.items()} for _ in range(2))
    _add_by_autograd(net, task, batch, expected)
    rows: set[str] = set()
    try:
        served = add_by_layers(net, task, batch, layers, found, checked=rows)[0]
    except Exception:
        layers = {path: own for path, own in layers.items() if path not in rows}
        served = add_by_layers(net, task, batch, layers, found, checked=set())[0]
    noise = NOISE * max(float(t.max()) for t in expected.values() if t.numel())
    errors = {n: (found[n] - expected[n]).abs() for n in served}
    right = {n for n in served if bool((errors[n] <= TOLERANCE * expected[n].max() + noise).all())}
    kept = {p: {n: f for n, f in own.items() if f in right} for p, own in layers.items()}
    return {path: own for path, own in kept.items() if own}


def add_by_layers(
    net: Net,
    task: Task,
    batch: Batch,
    layers: Layers,
    sums: Mapping[str, Tensor],
    draw: Callable[[Model, Batch], Batch] | None = None,
    checked: set[str] | None = None,
) -> tuple[set[str], Batch]:
    """Add the squared gradients of each example of a batch, with targets from `draw`, to `sums`.

    One backward pass of the summed losses gives the gradients at all layers' outputs of every
    example, since examples do not meet. Parameters take part without gradient, so that autograd
    computes input gradients alone. Returns the names that were served, those of layers that were
    called on the whole batch, and the batch with its targets. checked: leave out rules that fail,
    and note here the layers with one row for all examples (positions), which gets a copy for each:
    where that cannot be broadcast, the pass fails.
    """
    size = len(next(iter(batch.values())))
    calls: dict[str, list[tuple[Callable[..., Call], GradientEdge]]] = {p: [] for p in layers}
    strange: set[str] = set()

    def record(path: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Tensor | None:
        first = next((a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)), None)
        if not all(
            isinstance(t, Tensor) and t.ndim and len(t) in (1, size) for t in (first, output)
        ):
            strange.add(path)
            return None
        assert first is not None
        given = first.detach().expand(size, *first.shape[1:])
        if len(output) != size:
            if checked is not None:
                checked.add(path)
            output = output.expand(size, *output.shape[1:]).clone()
        if not output.requires_grad:  # a leaf itself could not be changed in place by what follows
            output = output.detach().requires_grad_().clone()
        args = tuple(given if a is first else a for a in args)
        kwargs = {n: given if a is first else a for n, a in kwargs.items()}
        calls[path].append((partial(Call, args, kwargs, given), get_gradient_edge(output)))
        return output

    hooks = [
        net.module.get_submodule(path).register_forward_hook(
            partial(record, path), with_kwargs=True
        )
        for path in layers
    ]
    model = _Once(net)
    try:
        with torch.enable_grad():
            batch = batch if draw is None else draw(model, batch)
            loss = task.loss(model, batch)[0].sum()
    finally:
        for hook in hooks:
            hook.remove()
    edges = [edge for path in layers for _, edge in calls[path]]
    grads = iter(torch.autograd.grad(loss, edges, allow_unused=True) if edges else ())
    served: set[str] = set()
    for path, own in layers.items():
        module = net.module.get_submodule(path)
        pairs = [(make, next(grads)) for make, _ in calls[path]]
        made = [make(grad) for make, grad in pairs if grad is not None]
        if path in strange or not pairs:
            continue
        try:
            if made:
                rule = RULES.get(type(module), any_module)
                rule(module, made, {name: sums[full] for name, full in own.items()})
            served.update(own.values())
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
    """A net's module with parameters of its own, at least float32, of which `trained` have gradients.

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
