"""SGD with momentum that moves, and remembers, the kept coordinates only."""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from deltafl.algebra.tensors import BLOCK
from deltafl.sparse.masks import Mask


class SparseSGDM(torch.optim.Optimizer):
    """SGDM on a flat vector at the coordinates `index`, int32 (k,), ascending.

    d = g[idx] + weight_decay w[idx]; m <- d in the first step, else momentum m + (1 - dampening) d;
    u = d + momentum m (Nesterov) or m; w[idx] -= lr u. With index None (all is kept) it is
    torch.optim.SGD bit for bit. m is (k,); other coordinates never change.
    """

    def __init__(
        self,
        flat: nn.Parameter,
        index: Tensor | None,
        lr: float,
        momentum: float = 0.9,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
    ) -> None:
        self.flat, self.index = flat, index
        settings = {"lr": lr, "momentum": momentum, "dampening": dampening}
        super().__init__([flat], settings | {"weight_decay": weight_decay, "nesterov": nesterov})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's, without the wrapper around it that imports the compiler: 1.4 s."""
        inspect.unwrap(torch.optim.Optimizer.add_param_group)(self, param_group)

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """One step."""
        flat, index, group = self.flat, self.index, self.param_groups[0]
        assert flat.grad is not None
        state = self.state[flat]
        first = "momentum_buffer" not in state
        if first and group["momentum"]:
            state["momentum_buffer"] = flat.new_empty(len(flat) if index is None else len(index))
        buffer = state.get("momentum_buffer")
        if index is None:
            _step(flat.data, flat.grad, buffer, first, group)
            return
        size = BLOCK if index.is_cpu else len(index)
        for start in range(0, len(index), size):
            places = index[start : start + size].long()
            part = None if buffer is None else buffer[start : start + size]
            kept = flat.index_select(0, places)
            _step(kept, flat.grad.index_select(0, places), part, first, group)
            flat.index_copy_(0, places, kept)

    @torch.no_grad()
    def mask_gradients_(self) -> None:
        """Zero the frozen coordinates of the gradient, so that a norm or a sum sees kept ones
        only.
        """
        if self.flat.grad is not None and self.index is not None:
            kept = self.flat.grad.index_select(0, self.index)
            self.flat.grad.zero_().index_copy_(0, self.index.long(), kept)


def _step(
    weights: Tensor, gradient: Tensor, buffer: Tensor | None, first: bool, group: Mapping[str, Any]
) -> None:
    """One step of torch.optim.SGD, operation by operation; `weights` and `buffer` change."""
    if group["weight_decay"]:
        gradient = gradient.add(weights, alpha=group["weight_decay"])
    if buffer is not None:
        if first:
            buffer.copy_(gradient)
        else:
            buffer.mul_(group["momentum"]).add_(gradient, alpha=1 - group["dampening"])
        gradient = gradient.add(buffer, alpha=group["momentum"]) if group["nesterov"] else buffer
    weights.add_(gradient, alpha=-group["lr"])


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
