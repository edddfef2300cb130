"""Sensitivity of a model's parameters: the diagonal of the Fisher information (arXiv
1612.00796).
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from deltafl.algebra.tensors import Tensors
from deltafl.errors import DeltaflError
from deltafl.models.net import Net
from deltafl.sparse.recipe import FisherLabels
from deltafl.tasks.task import Batch, Task

logger = logging.getLogger(__name__)

CHUNK = 1 << 26
"""Elements of the gradients of single examples that are held at once: 256 MB in float32."""


@dataclass
class FisherScorer:
    """Sums over examples of E_y[(d log p(y | x_i) / d theta_j)^2], of gradients of single examples.

    theta is what trains of `net`, -log p(y | x_i) the loss of `task` (of a line: of all its
    tokens), in eval mode and at least float32. labels: "sampled" averages over `draws` targets y
    that the task draws from the model; "empirical" takes the data's. Values, gradients, modes and
    hooks of the model stay as they are. A model that `vmap` cannot trace is asked for one example
    after the other, and that is logged.
    """

    net: Net
    task: Task
    labels: FisherLabels = "sampled"
    draws: int = 1
    batch_size: int = 64
    one_by_one: bool = field(init=False, default=False)

    def __call__(self, ids: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """The sum over the training examples at `ids`, int64 (n,), in the order of `flat`, in each
        parameter's shape. Batches are summed in float64. Targets are drawn with `generator`.

        Sums of disjoint data add up to the sum of their union, up to rounding: clients send this,
        the server adds.

        Raises:
            DeltaflError: a task that draws no targets, or batch norm without running statistics,
                which mixes examples.
        """
        module, sampled = self.net.module, self.labels == "sampled"
        for path, part in module.named_modules():
            if isinstance(part, nn.modules.batchnorm._BatchNorm) and part.running_mean is None:
                raise DeltaflError(
                    f'batch norm "{path}" has no running statistics, so that examples have no '
                    "gradients of their own; build it with track_running_stats=True"
                )
        held = {
            n: t.detach().to(torch.promote_types(t.dtype, torch.float32))
            for n, t in (*module.named_parameters(), *module.named_buffers())
            if t.is_floating_point()
        }
        own = {n: held.pop(n) for n in self.net.slices}
        totals = {n: torch.zeros_like(t, dtype=torch.float64) for n, t in own.items()}
        draws = self.draws if sampled else 1
        size = min(self.batch_size, max(1, CHUNK // sum(t.numel() for t in own.values())))
        training = module.training
        module.eval()
        try:
            for part in ids.repeat_interleave(draws).split(size):
                batch = self.task.batch("train", part, self.net.device)
                if sampled:
                    model = partial(_call, module, own, held)
                    batch = self.task.sampled(model, batch, generator)
                for found in self._gradients(own, held, batch):
                    for name, total in totals.items():
                        total.add_(found[name].square().view(-1, *total.shape).sum(0))
        finally:
            module.train(training)
        return {n: (t / draws).to(own[n].dtype) for n, t in totals.items()}

    def _gradients(self, own: Tensors, held: Tensors, batch: Batch) -> Iterator[Tensors]:
        """Those of all examples, (B, ...), or of one after the other."""

        def loss(own: Tensors, batch: Batch) -> Tensor:
            model = partial(_call, self.net.module, own, held)
            return self.task.loss(model, batch)[0].sum()

        if not self.one_by_one:
            try:
                # the fused kernels of attention have no batching rule
                with sdpa_kernel(SDPBackend.MATH):
                    rows = {name: tensor[:, None] for name, tensor in batch.items()}
                    yield vmap(grad(loss), (None, 0))(own, rows)
                return
            except Exception as error:  # vmap cannot trace what depends on values
                logger.info("Fisher scores are computed example by example: %s", error)
                self.one_by_one = True
        for i in range(len(next(iter(batch.values())))):
            yield grad(loss)(own, {name: tensor[i : i + 1] for name, tensor in batch.items()})


def _call(
    module: nn.Module, own: Tensors, held: Tensors, *args: object, **kwargs: object
) -> object:
    """What the module gives with other tensors."""
    return functional_call(module, {**held, **own}, args, kwargs)
