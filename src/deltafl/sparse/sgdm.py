"""SGD with momentum that moves, and remembers, the kept coordinates only."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from deltafl.errors import DeltaflError
from deltafl.models.flat import FlatModel
from deltafl.models.net import Net
from deltafl.sparse.masks import Mask
from deltafl.sparse.packed import KeptIndex, NumBytes, index_of


class SparseSGDM(torch.optim.Optimizer):
    """SGDM on `model.flat` at the coordinates of a mask, and on the dense `extra` tensors (a head) by the same rule.

    d = g[idx] + weight_decay w[idx]; m <- d in the first step, else momentum m + (1 - dampening) d;
    u = d + momentum m (Nesterov) or m; w[idx] -= lr u. With mask None, or all True, it is torch.optim.SGD bit for bit.
    m is (k,) float32 for k kept coordinates; which they are is held as packed bits. Other coordinates never change.
    `frozen`: names of the tensors without a kept coordinate. `index` (None: all is kept) also packs deltas.

    Raises:
        DeltaflError: a negative lr, momentum or weight decay, Nesterov without momentum or with dampening, or a mask
            that is not this model's or keeps nothing.
    """

    def __init__(
        self,
        model: FlatModel | Net,
        mask: Mask | None,
        lr: float,
        momentum: float = 0.9,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        extra: Sequence[Tensor] = (),
    ) -> None:
        if min(lr, momentum, weight_decay) < 0:
            raise DeltaflError(
                f"lr {lr}, momentum {momentum}, weight_decay {weight_decay}: none may be negative"
            )
        if nesterov and (momentum == 0 or dampening != 0):
            raise DeltaflError("Nesterov momentum needs momentum above 0 and dampening 0")
        self._model = model
        self.index: KeptIndex | None = None
        self.frozen: tuple[str, ...] = ()
        if mask is not None:
            index = index_of(mask, model.slices, model.device)
            if index.count == 0:
                raise DeltaflError("the mask keeps no coordinate; choose a lower sparsity")
            self.frozen = tuple(name for name in model.slices if not mask[name].any())
            self.index = None if index.count == index.numel else index
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
        }
        super().__init__([model.flat, *extra], defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's, without the wrapper around it that imports the compiler, which takes seconds."""
        add = torch.optim.Optimizer.add_param_group
        getattr(add, "__wrapped__", add)(self, param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step; parameters without a gradient are left alone."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        group = self.param_groups[0]
        for parameter in group["params"]:
            if parameter.grad is None:
                continue
            index = self.index if parameter is self._model.flat else None
            buffer, first = self._momentum(parameter, index, group["momentum"])
            weights, gradient = parameter.data, parameter.grad
            if index is None:
                sgdm_(weights, gradient, buffer, first, group)
                continue
            for start, stop, a, b in index.pieces():
                part = None if buffer is None else buffer[a:b]
                if b - a == stop - start:
                    sgdm_(weights[start:stop], gradient[start:stop], part, first, group)
                    continue
                places = index.decode(start, stop)
                kept = weights[start:stop].index_select(0, places)
                sgdm_(kept, gradient[start:stop].index_select(0, places), part, first, group)
                weights[start:stop].index_copy_(0, places, kept)
        return loss

    def _momentum(
        self, parameter: Tensor, index: KeptIndex | None, momentum: float
    ) -> tuple[Tensor | None, bool]:
        """(momentum buffer, whether this is its first step)."""
        if momentum == 0:
            return None, True
        state = self.state[parameter]
        first = not state.get("started", False)
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = (
                torch.empty_like(parameter) if index is None else parameter.new_empty(index.count)
            ).detach()
        state["started"] = True
        return state["momentum_buffer"], first

    def reset(self) -> None:
        """Forget the momentum: the next step is a first one. Buffers are kept for it."""
        for state in self.state.values():
            state["started"] = False

    @torch.no_grad()
    def mask_gradients_(self) -> None:
        """Zero the frozen coordinates of `model.flat.grad`, so that a norm or a sum sees the kept ones only."""
        gradient = self._model.flat.grad
        if gradient is None or self.index is None:
            return
        end = 0
        for start, stop, a, b in self.index.pieces():
            gradient[end:start].zero_()
            end = stop
            if b - a < stop - start:
                places = self.index.decode(start, stop)
                kept = gradient[start:stop].index_select(0, places)
                gradient[start:stop].zero_().index_copy_(0, places, kept)
        gradient[end:].zero_()

    @contextmanager
    def skip_frozen(self) -> Iterator[tuple[str, ...]]:
        """Within the block the tensors in `frozen` have requires_grad=False: their gradients, which are zeroed, are
        not computed. Yields their names; at the end, also after an error, they are as before.
        """
        parameters = dict(self._model.module.named_parameters())
        skipped: list[nn.Parameter] = [
            parameters[name] for name in self.frozen if parameters[name].requires_grad
        ]
        try:
            for parameter in skipped:
                parameter.requires_grad_(False)
                if parameter.grad is not None:
                    parameter.grad.zero_()
            yield self.frozen
        finally:
            for parameter in skipped:
                parameter.requires_grad_(True)

    @property
    def num_bytes(self) -> NumBytes:
        """Bytes of the momentum of `model.flat` and `extra` (0 before the first step), and of the index."""
        values = sum(
            t.nbytes
            for state in self.state.values()
            for t in state.values()
            if isinstance(t, Tensor)
        )
        return NumBytes(values, 0 if self.index is None else self.index.num_bytes)

    def state_dict(self) -> dict[str, Any]:
        """As torch's, with a digest of the mask."""
        return {**super().state_dict(), "mask": None if self.index is None else self.index.digest}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken; the tensors are copied.

        Raises:
            DeltaflError: the state was taken with another mask.
        """
        if state_dict.get("mask", "") != (None if self.index is None else self.index.digest):
            raise DeltaflError("the optimiser's state was saved with another mask; load that mask")
        super().load_state_dict(
            {name: value for name, value in state_dict.items() if name != "mask"}
        )
        for state in self.state.values():
            if "momentum_buffer" in state:
                state["momentum_buffer"] = state["momentum_buffer"].clone()


def sgdm_(
    weights: Tensor, gradient: Tensor, buffer: Tensor | None, first: bool, group: dict[str, Any]
) -> None:
    """One step of torch.optim.SGD, operation by operation, on `weights` and `buffer`, which are changed."""
    if group["weight_decay"]:
        gradient = gradient.add(weights, alpha=group["weight_decay"])
    if buffer is not None:
        if first:
            buffer.copy_(gradient)
        else:
            buffer.mul_(group["momentum"]).add_(gradient, alpha=1 - group["dampening"])
        gradient = gradient.add(buffer, alpha=group["momentum"]) if group["nesterov"] else buffer
    weights.add_(gradient, alpha=-group["lr"])
