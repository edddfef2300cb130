"""An image encoder as the rest of the package sees it: a module, how to get features, what its input must be."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from deltafl.errors import DeltaflError
from deltafl.tasks.inputs import ImageInput

Embed: TypeAlias = Callable[[nn.Module, Tensor], Tensor]
"""(module, normalised float images (B, C, H, W)) -> features (B, D)."""


InputSpec = ImageInput


@dataclass(frozen=True)
class Factory:
    """A user's own model: `ref` is `module:attr`, called with `kwargs` (values that JSON can hold)."""

    ref: str
    kwargs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class LoadedEncoder:
    """A module in float32 and eval mode, with all that is needed to use and to save it.

    `origin` is the directory, hub id or `module:attr` that it came from ("" for a new one). Parameters that the
    features do not depend on (a mask token, an unused classifier) have `requires_grad=False`: weight decay would
    otherwise move them, and a delta would hold training that never happened.
    """

    module: nn.Module
    embed: Embed
    input: InputSpec
    feature_dim: int
    origin: str
    factory: Factory | None = None

    def features(self, images: Tensor) -> Tensor:
        """uint8 images (B, C, H, W) on the module's device -> features (B, D)."""
        return self.embed(self.module, self.input.normalise(images))

    def copy_to(self, device: torch.device | str) -> "LoadedEncoder":
        """The same encoder around a copy of the module on `device`."""
        return replace(self, module=copy.deepcopy(self.module).to(device))


def assemble(
    module: nn.Module, embed: Embed, spec: InputSpec, origin: str, factory: Factory | None = None
) -> LoadedEncoder:
    """Probe `module` (changed in place: float32, eval, unused parameters frozen) with one grey image.

    Raises:
        DeltaflError: the features are not (1, D).
    """
    module.float().eval()
    parameters = [p for p in module.parameters() if p.requires_grad]
    with torch.enable_grad():
        probe = embed(module, torch.zeros(1, spec.channels, spec.image_size, spec.image_size))
        if not isinstance(probe, Tensor) or probe.ndim != 2 or len(probe) != 1:
            shape = tuple(probe.shape) if isinstance(probe, Tensor) else type(probe).__name__
            raise DeltaflError(
                f'model "{origin}": one image gives {shape}, features must be (1, D); add `.embed(x)`'
            )
        grads = torch.autograd.grad(probe.sum(), parameters, allow_unused=True)
    for parameter, grad in zip(parameters, grads, strict=True):
        parameter.requires_grad_(grad is not None)
    return LoadedEncoder(module, embed, spec, probe.shape[1], origin, factory)
