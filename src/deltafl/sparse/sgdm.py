"""SGD with momentum that moves, and remembers, the kept coordinates only."""

from functools import partial

import torch
from torch import Tensor, nn
from torch.optim.sgd import sgd


class SparseSGDM:
    """torch.optim.SGD on the coordinates `index`, int32 (k,), ascending, of a flat vector.

    kept: their values, which step, and their gradients, (k,); the vector itself with index None.
    Other coordinates never change. Making an optimiser of torch takes as long as many rounds.
    """

    def __init__(
        self,
        flat: nn.Parameter,
        index: Tensor | None,
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        nesterov: bool = False,
    ) -> None:
        self.flat, self.index = flat, index
        self.kept = flat
        if index is not None:
            self.kept = nn.Parameter(flat.detach().index_select(0, index))
        self.param_groups = [{"lr": lr}]
        self.buffers: list[Tensor | None] = [None]
        self._sgd = partial(
            sgd,
            momentum=momentum,
            weight_decay=weight_decay,
            nesterov=nesterov,
            dampening=0,
            maximize=False,
        )

    def gather(self) -> None:
        """Take over the gradient of the kept coordinates, to be clipped and stepped by."""
        if self.index is not None:
            assert self.flat.grad is not None
            self.kept.grad = self.flat.grad.index_select(0, self.index)

    @torch.no_grad()
    def step(self) -> None:
        """One step."""
        assert self.kept.grad is not None
        self._sgd([self.kept], [self.kept.grad], self.buffers, lr=self.param_groups[0]["lr"])
        if self.index is not None:
            self.flat.index_copy_(0, self.index.long(), self.kept)
