"""An image classifier: an encoder and the linear head on its features, one module."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from deltafl.errors import DeltaflError
from deltafl.models.head import HEAD_FILE, Head, load_head
from deltafl.tasks.inputs import ImageInput

Embed = Callable[[nn.Module, Tensor], Tensor]
"""(encoder, normalised float images (B, C, H, W)) -> features (B, D)."""


class Classifier(nn.Module):
    """uint8 images (B, C, H, W) -> logits (B, K).

    `encoder` is changed in place: float32, eval mode, and what the features do not depend on (a
    mask token, an unused classifier) is frozen: weight decay would otherwise move it, and a delta
    would hold training that never happened. `origin`: the folder whose head is taken, if it has
    one.

    Raises:
        DeltaflError: the features of one grey image are not (1, D).
    """

    def __init__(self, encoder: nn.Module, embed: Embed, inputs: ImageInput, origin: str) -> None:
        super().__init__()
        self.encoder = encoder.float().eval()
        self.embed, self.inputs = embed, inputs
        parameters = [p for p in encoder.parameters() if p.requires_grad]
        with torch.enable_grad():
            grey = torch.zeros(1, inputs.channels, inputs.image_size, inputs.image_size)
            features = embed(encoder, grey)
            if not isinstance(features, Tensor) or features.ndim != 2 or len(features) != 1:
                found = tuple(features.shape) if isinstance(features, Tensor) else type(features)
                raise DeltaflError(
                    f'model "{origin}": one image gives {found}, features must be (1, D); '
                    "add `.embed(x)`"
                )
            grads = torch.autograd.grad(features.sum(), parameters, allow_unused=True)
        for parameter, grad in zip(parameters, grads, strict=True):
            parameter.requires_grad_(grad is not None)
        self.feature_dim = features.shape[1]
        self.eval()
        file = Path(origin) / HEAD_FILE
        self.head: Head | None = load_head(file) if origin and file.is_file() else None

    def features(self, images: Tensor) -> Tensor:
        """uint8 images (B, C, H, W) -> features (B, D)."""
        return self.embed(self.encoder, self.inputs.normalise(images))

    def forward(self, images: Tensor) -> Tensor:
        if self.head is None:
            raise DeltaflError("the model has no head yet; fit one, or give it with --head")
        return self.head(self.features(images))
