"""Sensitivity of a model's parameters: the diagonal of the Fisher information (arXiv
1612.00796).
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.func import functional_call

from deltafl.errors import DeltaflError, shorten
from deltafl.models.net import Net
from deltafl.sparse.eligible import trained
from deltafl.sparse.layers import Call, Sums, apply_rule
from deltafl.sparse.recipe import FisherLabels
from deltafl.tasks.task import Batch, Model, Task

logger = logging.getLogger(__name__)

Layers: TypeAlias = Mapping[str, Mapping[str, str]]
"""Module path -> name of a parameter in the module -> its name in the net."""
Draw: TypeAlias = Callable[[Model, Batch], Batch]

CHECKED = 2
"""Examples on which a layer must give what autograd gives; two, for one has no order of
examples.
"""
TOLERANCE = 1e-3
"""Relative to a tensor's largest score, beyond rounding in float32."""
NOISE = 1e-12
"""Relative to the model's largest score: less is the square of rounding."""


@dataclass
class FisherScorer:
    """Sums over examples of E_y[(d log p(y | x_i) / d theta_j)^2], of gradients of single examples.

    theta is what trains of `net`, -log p(y | x_i) the loss of `task` (of a line: of all its
    tokens), in eval mode and at least float32. labels: "sampled" averages over `draws` targets y
    that the task draws from the model; "empirical" takes the data's. Values, gradients, modes and
    hooks of the model stay as they are. What no layer serves, which is asked at the first batch,
    goes example by example, and that is logged.
    """

    net: Net
    task: Task
    labels: FisherLabels = "sampled"
    draws: int = 1
    batch_size: int = 64
    layers: Layers = field(init=False, default_factory=dict)

    def __call__(self, ids: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """The sum over the training examples at `ids`, int64 (n,), in the order of `flat`, in each
        parameter's shape. Batches are summed in float64. Targets are drawn with `generator`.

        Sums of disjoint data add up to the sum of their union, up to rounding: clients send this,
        the server adds.

        Raises:
            DeltaflError: a task that draws no targets, or batch norm without running statistics,
                which mixes examples.
        """
        draws, draw = 1, None
        if self.labels == "sampled":
            draws, draw = self.draws, partial(self.task.sampled, generator=generator)
        tensors = self._tensors()
        zeros = {n: torch.zeros_like(tensors[n]) for n in trained(self.net)}
        totals = {n: torch.zeros_like(t, dtype=torch.float64) for n, t in zeros.items()}
        training = self.net.module.training
        self.net.module.eval()
        try:
            for part in ids.repeat_interleave(draws).split(self.batch_size):
                for name, values in self._sums_of(part, zeros, draw).items():
                    totals[name].add_(values)
        finally:
            self.net.module.train(training)
        return {n: (t / draws).to(zeros[n].dtype) for n, t in totals.items()}

    @torch.no_grad()
    def _sums_of(self, ids: Tensor, zeros: Sums, draw: Draw | None) -> Sums:
        """The sum over a batch."""
        batch = self.task.batch("train", ids, self.net.device)
        if not self.layers:
            self.layers = self._find_layers(batch, zeros)
        sums = {n: t.clone() for n, t in zeros.items()}
        batch, calls = self._calls(batch, self.layers, draw)
        for path, made in calls.items():
            for call in made:
                apply_rule(call, {n: sums[name] for n, name in self.layers[path].items()})
        served = {name for path in calls for name in self.layers[path].values()}
        if rest := {n: t for n, t in sums.items() if n not in served}:
            self._add_by_example(batch, rest)
        return sums

    def _find_layers(self, batch: Batch, zeros: Sums) -> Layers:
        """The layers that on `CHECKED` examples of a batch give the scores of autograd.

        That leaves out weights that are tied or read elsewhere, examples that are not the first
        dimension of a call, inputs that are changed in place, and modules that vmap cannot trace.
        """
        module = self.net.module
        for path, part in module.named_modules():
            if isinstance(part, nn.modules.batchnorm._BatchNorm) and part.running_mean is None:
                raise DeltaflError(
                    f'batch norm "{path}" has no running statistics, so that examples have no '
                    "gradients of their own; build it with track_running_stats=True"
                )
        rows = torch.arange(CHECKED, device=self.net.device) % len(next(iter(batch.values())))
        batch = {name: tensor[rows] for name, tensor in batch.items()}
        names = {id(p): n for n, p in module.named_parameters() if n in zeros}
        layers = {
            path: {n: names[id(p)] for n, p in part._parameters.items() if id(p) in names}
            for path, part in module.named_modules()
        }
        expected, found = ({n: t.clone() for n, t in zeros.items()} for _ in range(2))
        self._add_by_example(batch, expected)
        served: set[str] = set()
        try:
            calls = self._calls(batch, layers)[1]
        except Exception:  # what is one row for all examples does not broadcast as a row for each
            calls = {}
        for path, made in calls.items():
            try:
                for call in made:
                    apply_rule(call, {n: found[name] for n, name in layers[path].items()})
            except Exception:  # vmap cannot trace what depends on values
                continue
            served.update(layers[path].values())
        noise = NOISE * max(float(t.max()) for t in expected.values() if t.numel())
        for name in tuple(served):
            error = (found[name] - expected[name]).abs()
            if (error > TOLERANCE * expected[name].max() + noise).any():
                served.remove(name)
        if rest := [name for name in zeros if name not in served]:
            logger.info("Fisher scores of %s are computed example by example", shorten(rest))
        return {p: {n: f for n, f in own.items() if f in served} for p, own in layers.items()}

    def _calls(
        self, batch: Batch, layers: Layers, draw: Draw | None = None
    ) -> tuple[Batch, Mapping[str, list[Call]]]:
        """The batch, with targets from `draw`, and each layer's call on which its loss depends.

        One backward pass of the summed losses gives the gradients at all layers' outputs of every
        example, since examples do not meet. Parameters take part without gradient, so that autograd
        computes input gradients alone. A layer is absent where it is called twice, or where its
        first argument and its output have not the examples, or one row for all of them, as their
        first dimension.
        """
        size = len(next(iter(batch.values())))
        found: dict[str, list[Call]] = {path: [] for path, own in layers.items() if own}
        noted: list[tuple[str, Call]] = []

        def note(
            path: str,
            module: nn.Module,
            args: tuple[object, ...],
            kwargs: Mapping[str, object],
            output: object,
        ) -> object:
            pair = [t for t in (*args[:1], output) if isinstance(t, Tensor)]
            if len(pair) < 2 or any(t.shape[:1] not in ((1,), (size,)) for t in pair):
                found.pop(path, None)
                return output
            given, result = (t.expand(size, *t.shape[1:]) for t in pair)
            probe = result.new_zeros(()).expand(result.shape).requires_grad_()
            noted.append((path, Call(module, given.detach(), args[1:], kwargs, probe)))
            return result + probe

        modules = ((path, self.net.module.get_submodule(path)) for path in found)
        hooks = [m.register_forward_hook(partial(note, p), with_kwargs=True) for p, m in modules]
        model = self._model(self._tensors())
        try:
            with torch.enable_grad():
                batch = batch if draw is None else draw(model, batch)
                loss = self.task.loss(model, batch)[0].sum()
        finally:
            for hook in hooks:
                hook.remove()
        probes = [call.grad for _, call in noted]
        grads = torch.autograd.grad(loss, probes, allow_unused=True) if probes else ()
        for (path, call), grad in zip(noted, grads, strict=True):
            if grad is not None and path in found:
                found[path].append(replace(call, grad=grad))
        return batch, {path: calls for path, calls in found.items() if len(calls) < 2}

    def _add_by_example(self, batch: Batch, sums: Sums) -> None:
        """Add the same by ordinary autograd, one example at a time: any model, but slow."""
        tensors = self._tensors()
        model, wanted = self._model(tensors), [tensors[n].requires_grad_() for n in sums]
        for i in range(len(next(iter(batch.values())))):
            one = {name: tensor[i : i + 1] for name, tensor in batch.items()}
            with torch.enable_grad():
                loss = self.task.loss(model, one)[0].sum()
            grads = torch.autograd.grad(loss, wanted, materialize_grads=True)
            for total, gradient in zip(sums.values(), grads, strict=True):
                total.addcmul_(gradient, gradient)

    def _tensors(self) -> dict[str, Tensor]:
        """The module's float tensors, at least float32, without its own gradients."""
        held = (*self.net.module.named_parameters(), *self.net.module.named_buffers())
        return {
            n: t.detach().to(torch.promote_types(t.dtype, torch.float32))
            for n, t in held
            if t.is_floating_point()
        }

    def _model(self, tensors: dict[str, Tensor]) -> Model:
        """The net's module on other tensors; asked twice for the same, as by a task that draws
        targets and then takes the loss with them, it computes once.
        """
        module = self.net.module
        return cache(lambda *args, **kwargs: functional_call(module, tensors, args, kwargs))
