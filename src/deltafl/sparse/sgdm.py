"""SGD with momentum that moves, and remembers, the kept coordinates only."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from deltafl.algebra.tensors import BLOCK
from deltafl.sparse.masks import Mask


class SparseSGDM:
    """SGDM on a flat vector at the coordinates `index`, int32 (k,), ascending.

    d = g[idx] + weight_decay w[idx]; m <- momentum m + d, from 0; u = d + momentum m (Nesterov) or
    m; w[idx] -= lr u. With index None (all is kept) it is torch.optim.SGD bit for bit. m is (k,);
    other coordinates never change.
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
        self.flat, self.index, self.param_groups = flat, index, [{"lr": lr}]
        self.momentum, self.weight_decay, self.nesterov = momentum, weight_decay, nesterov
        size = len(flat if index is None else index) if momentum else 0
        self.buffer = flat.detach().new_zeros(size)

    @torch.no_grad()
    def step(self) -> None:
        """One step."""
        flat, index = self.flat, self.index
        assert flat.grad is not None
        if index is None:
            self._step(flat, flat.grad, self.buffer)
            return
        size = BLOCK if index.is_cpu else len(index)
        for start in range(0, len(index), size):
            places = index[start : start + size].long()
            kept = flat.index_select(0, places)
            gradient = flat.grad.index_select(0, places)
            self._step(kept, gradient, self.buffer[start : start + size])
            flat.index_copy_(0, places, kept)

    def _step(self, weights: Tensor, gradient: Tensor, buffer: Tensor) -> None:
        """One step of torch.optim.SGD, operation by operation; `weights` and `buffer` change."""
        if self.weight_decay:
            gradient = gradient.add(weights, alpha=self.weight_decay)
        if self.momentum:
            buffer.mul_(self.momentum).add_(gradient)
            gradient = gradient.add(buffer, alpha=self.momentum) if self.nesterov else buffer
        weights.add_(gradient, alpha=-self.param_groups[0]["lr"])

    @torch.no_grad()
    def mask_gradients_(self) -> None:
        """Zero the frozen coordinates of the gradient, so that a norm or a sum sees kept ones
        only.
        """
        if self.flat.grad is not None and self.index is not None:
            kept = self.flat.grad.index_select(0, self.index)
            self.flat.grad.zero_().index_copy_(0, self.index.long(), kept)


@contextmanager
def frozen_tensors(module: nn.Module, mask: Mask) -> Iterator[tuple[str, ...]]:
    """Within the block the tensors of which `mask` keeps nothing have requires_grad=False: their
    gradients, which are zeroed, are not computed. Yields their names; at the end, also after an
    error, they are as before.
    """
    names = tuple(name for name, kept in mask.items() if not kept.any())
    parameters = [module.get_parameter(name) for name in names]
    try:
        for parameter in parameters:
            parameter.requires_grad_(False)
            if parameter.grad is not None:
                parameter.grad.zero_()
        yield names
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)
