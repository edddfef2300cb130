"""An image classifier: an encoder and the linear head on its features, one module."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from deltafl.errors import DeltaflError
from deltafl.tasks.inputs import ImageInput

Embed = Callable[[nn.Module, Tensor], Tensor]
"""(encoder, normalised float images (B, C, H, W)) -> features (B, D)."""


class Head(nn.Module):
    """`logits = features @ weight^T + bias`; weight float32 (K, D), bias float32 (K,), a name a row.

    normalised: each feature vector is divided by its L2 norm first, as CLIP's zero-shot head wants.

    Raises:
        DeltaflError: the shapes and the number of names do not fit together.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor, class_names: Sequence[str], normalised: bool = False
    ) -> None:
        super().__init__()
        classes = len(class_names)
        if weight.ndim != 2 or len(weight) != classes or tuple(bias.shape) != (classes,):
            raise DeltaflError(
                f"a head of {classes} classes has weight {tuple(weight.shape)} and bias "
                f"{tuple(bias.shape)}; they must be ({classes}, features) and ({classes},)"
            )
        self.weight = nn.Parameter(weight.detach().clone())
        self.bias = nn.Parameter(bias.detach().clone())
        self.class_names = tuple(class_names)
        self.normalised = normalised

    @property
    def feature_dim(self) -> int:
        """D, what the encoder must give."""
        return self.weight.shape[1]

    def forward(self, features: Tensor) -> Tensor:
        """(B, D) -> (B, K)."""
        if self.normalised:
            features = nn.functional.normalize(features, dim=-1)
        return nn.functional.linear(features, self.weight, self.bias)


class Classifier(nn.Module):
    """uint8 images (B, C, H, W) -> logits (B, K).

    `encoder` is changed in place: float32, eval mode, and what the features do not depend on (a
    mask token, an unused classifier) is frozen: weight decay would otherwise move it, and a delta
    would hold training that never happened.

    Raises:
        DeltaflError: the features of one grey image are not (1, D).
    """

    def __init__(self, encoder: nn.Module, embed: Embed, inputs: ImageInput, origin: str) -> None:
        super().__init__()
        self.encoder = encoder.float().eval()
        self.head: Head | None = None
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

    def features(self, images: Tensor) -> Tensor:
        """uint8 images (B, C, H, W) -> features (B, D)."""
        return self.embed(self.encoder, self.inputs.normalise(images))

    def forward(self, images: Tensor) -> Tensor:
        if self.head is None:
            raise DeltaflError("the model has no head yet; fit one, or give it with --head")
        return self.head(self.features(images))
