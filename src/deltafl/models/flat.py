"""A model as one vector."""

import torch
from torch import Tensor, nn

from deltafl.algebra.tensors import Tensors, lazy
from deltafl.checkpoints.naming import match
from deltafl.errors import DeltaflError, shorten
from deltafl.models.encoder import LoadedEncoder


class FlatModel:
    """An encoder whose trainable parameters are views of one float32 vector, and their gradients of another.

    The encoder's module is changed in place: its parameters move into `flat` (M,), an nn.Parameter whose `grad` always
    exists, in the order of `module.named_parameters()`, tied parameters once. One optimiser over `[flat]` and one
    all-reduce of `flat.grad` then serve the whole model. Parameters with requires_grad=False and buffers stay as they
    are. Move the module to its device before, not after.

    Raises:
        DeltaflError: no trainable parameter, or parameters on several devices.
    """

    def __init__(self, encoder: LoadedEncoder) -> None:
        self.encoder = encoder
        self.module: nn.Module = encoder.module
        trainable = {n: p for n, p in self.module.named_parameters() if p.requires_grad}
        if not trainable:
            raise DeltaflError(f'model "{encoder.origin}" has no trainable parameter')
        if len({p.device for p in trainable.values()}) > 1:
            raise DeltaflError(
                f'model "{encoder.origin}" is on several devices; a flat model needs one'
            )
        self.flat = nn.Parameter(
            torch.cat([p.detach().float().reshape(-1) for p in trainable.values()])
        )
        self.flat.grad = torch.zeros_like(self.flat)
        self.slices: dict[str, slice] = {}
        start = 0
        for name, parameter in trainable.items():
            part = self.slices[name] = slice(start, start + parameter.numel())
            parameter.data = self.flat.data[part].view(parameter.shape)
            parameter.grad = self.flat.grad[part].view(parameter.shape)
            start = part.stop

    @property
    def device(self) -> torch.device:
        """Where the model is, and images must be."""
        return self.flat.device

    def features(self, images: Tensor) -> Tensor:
        """uint8 images (B, C, H, W) on `device` -> features (B, D)."""
        return self.encoder.features(images)

    def tensors(self) -> dict[str, Tensor]:
        """Name -> view of `flat` in the parameter's shape, without gradient; module names, in order of `flat`."""
        shapes = dict(self.module.named_parameters())
        return {
            name: self.flat.data[part].view(shapes[name].shape)
            for name, part in self.slices.items()
        }

    @torch.no_grad()
    def load(self, tensors: Tensors) -> tuple[str, ...]:
        """Copy in values by module names or by the names in a checkpoint's files; other dtypes are converted.

        Every trainable tensor must be given; frozen parameters and buffers are copied where given. Returns the names
        that this module does not hold (a text tower, a pooler).

        Raises:
            DeltaflError: a trainable tensor is absent or has another shape; nothing is changed then.
        """
        own = self.module.state_dict()
        pairs = {n: n for n in own if n in tensors}
        if not self.slices.keys() <= pairs.keys():
            pairs = match(own, tensors.keys())[0]
        missing = [n for n in self.slices if n not in pairs]
        if missing:
            raise DeltaflError(
                f"the model needs {shorten(missing)}, not among the {len(tensors)} tensors given"
            )
        for name, given in pairs.items():
            shape = lazy(tensors).spec(given).shape
            if own[name].shape != shape:
                raise DeltaflError(
                    f'tensor "{given}" is {shape}, the model has {tuple(own[name].shape)}'
                )
        for name, given in pairs.items():
            own[name].copy_(tensors[given])
        used = set(pairs.values())
        return tuple(n for n in tensors if n not in used)
