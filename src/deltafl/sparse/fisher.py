"""Sensitivity of a model's parameters: the diagonal of the Fisher information (arXiv
1612.00796).
"""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import get_args

import torch
from torch import Tensor, nn

from deltafl.errors import DeltaflError, did_you_mean, shorten
from deltafl.models.net import Net
from deltafl.sparse.eligible import trained
from deltafl.sparse.per_example import Layers, add_by_example, add_by_layers, find_layers
from deltafl.sparse.recipe import FisherLabels
from deltafl.tasks.task import Split, Task

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FisherSum:
    """sum_i E_y[(d log p(y | x_i) / d theta)^2] by name, in each parameter's shape, over `count`
    examples.

    Sums of disjoint data add up to the sum of their union, up to rounding: clients send this, the
    server adds.
    """

    sum: Mapping[str, Tensor]
    count: int

    def __add__(self, other: "FisherSum") -> "FisherSum":
        """Raises DeltaflError if the two are of different models."""
        if {n: t.shape for n, t in self.sum.items()} != {n: t.shape for n, t in other.sum.items()}:
            raise DeltaflError(
                "two Fisher sums have different names or shapes; are they of the same model?"
            )
        total = {n: t + other.sum[n] for n, t in self.sum.items()}
        return FisherSum(total, self.count + other.count)

    def mean(self) -> dict[str, Tensor]:
        """F = sum / count. Raises DeltaflError where nothing was counted."""
        if not self.count:
            raise DeltaflError("a Fisher sum over no examples has no mean; give at least one id")
        return {n: t / self.count for n, t in self.sum.items()}


class FisherScorer:
    """Sums over examples of E_y[(d log p(y | x_i) / d theta_j)^2], of gradients of single examples.

    theta is what trains of `net`, -log p(y | x_i) the loss of `task` (of a line: of all its
    tokens), in eval mode and at least float32. labels: "sampled" averages over `draws` targets y
    that the task draws from the model; "empirical" takes the data's. Values, gradients, modes and
    hooks of the model stay as they are. What no layer serves (`find_layers`, asked at the first
    batch) goes example by example, which is logged.

    Raises:
        DeltaflError: unknown `labels`, draws or batch_size < 1, or batch norm without running
            statistics, which mixes examples.
    """

    def __init__(
        self,
        net: Net,
        task: Task,
        labels: FisherLabels = "sampled",
        draws: int = 1,
        batch_size: int = 64,
    ) -> None:
        if labels not in (known := get_args(FisherLabels)):
            raise DeltaflError(f'unknown Fisher labels "{labels}"; {did_you_mean(labels, known)}')
        if draws < 1 or batch_size < 1:
            raise DeltaflError(
                f"Fisher needs draws >= 1 and batch_size >= 1, not {draws} and {batch_size}"
            )
        for name, module in net.module.named_modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None:
                raise DeltaflError(
                    f'batch norm "{name}" has no running statistics, so that examples have no '
                    "gradients of their own; build it with track_running_stats=True"
                )
        self._net, self._task, self._sampled = net, task, labels == "sampled"
        self._draws, self._batch_size = draws if self._sampled else 1, batch_size
        self._layers: Layers | None = None

    def __call__(
        self, split: Split, ids: Tensor, generator: torch.Generator | None = None
    ) -> FisherSum:
        """The sum over the examples at `ids`, int64 (n,), on the net's device, in the order of
        `flat`; batches are summed in float64. Sampled targets are drawn with `generator`.

        Raises:
            DeltaflError: no generator for sampled labels, or a task that draws none.
        """
        if self._sampled and generator is None:
            raise DeltaflError(
                'Fisher labels "sampled" need a generator; give one, or labels="empirical"'
            )
        net, task = self._net, self._task
        draw = partial(task.sampled, generator=generator) if generator and self._sampled else None
        sums = {
            n: torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)).detach()
            for n, p in trained(net).items()
        }
        totals = {n: torch.zeros_like(t, dtype=torch.float64) for n, t in sums.items()}
        rows = ids.repeat_interleave(self._draws)
        with _eval_mode(net.module), torch.no_grad():
            for part in rows.split(self._batch_size) if len(rows) else ():
                batch = task.batch(split, part, net.device)
                if self._layers is None:
                    self._layers = find_layers(net, task, batch, sums)
                    self._report(sums)
                for total in sums.values():
                    total.zero_()
                served, batch = add_by_layers(net, task, batch, self._layers, sums, draw)
                if rest := {n: t for n, t in sums.items() if n not in served}:
                    add_by_example(net, task, batch, rest)
                for name, total in totals.items():
                    total.add_(sums[name])
        means = {n: t.div_(self._draws).to(sums[n].dtype) for n, t in totals.items()}
        return FisherSum(means, len(ids))

    def _report(self, sums: Mapping[str, Tensor]) -> None:
        served = {name for own in (self._layers or {}).values() for name in own.values()}
        if rest := [name for name in sums if name not in served]:
            logger.info("Fisher scores of %s are computed example by example", shorten(rest))


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
