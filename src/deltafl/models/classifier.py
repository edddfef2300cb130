"""An image classifier: an encoder and the linear head on its features, one module."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from deltafl.errors import DeltaflError
from deltafl.models.head import HEAD_FILE, Head, load_head
from deltafl.models.head_recipe import HeadFit, HeadRecipe
from deltafl.models.net import Net
from deltafl.registry import Registry
from deltafl.tasks.images import ImageTask
from deltafl.tasks.inputs import ImageInput
from deltafl.tasks.task import Task, check_task

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


class ClassifierNet(Net):
    """A net of a `Classifier`: files hold the encoder's names, and the head has its own."""

    module: Classifier
    apart = ("head.",)
    takes_head = True

    @property
    def head(self) -> Head | None:
        return self.module.head

    def file_name(self, name: str) -> str:
        return name.removeprefix("encoder.")

    def save(self, folder: Path) -> None:
        self.write(self.module.encoder, folder)
        self.save_head(folder)

    def head_bytes(self, recipe: HeadRecipe, shards: Sequence[Tensor]) -> tuple[int, int]:
        """Up: for ridge every client's A and b, ((D+1)^2 + (D+1) C) float64 for D features and C
        classes; for a probe D float32 and an int64 label of every example.
        """
        assert self.head is not None
        features, classes = self.module.feature_dim, len(self.head.class_names)
        up = {
            "ridge": len(shards) * 8 * ((features + 1) ** 2 + (features + 1) * classes),
            "probe": sum(map(len, shards)) * (4 * features + 8),
        }
        return up.get(recipe.head, 0), 4 * classes * (features + 1)

    def snapshot(self) -> dict[str, object]:
        head = self.head
        told = head and (head.class_names, head.normalised, head.weight.requires_grad)
        return super().snapshot() | {"head": told}

    def restore(self, snapshot: Mapping) -> None:
        if snapshot["head"] is not None and self.head is None:
            (names, normalised, trained), tensors = snapshot["head"], snapshot["tensors"]
            head = Head(tensors["head.weight"], tensors["head.bias"], names, normalised)
            self.module.head = head.requires_grad_(trained).to(self.device)
        super().restore(snapshot)

    def prepare(self, task: Task, recipe: HeadRecipe, fit: HeadFit | None = None) -> None:
        """The head that `recipe` names, one of `HEADS` or a file; it trains if that says so."""
        images = self._images(task)
        if recipe.head in HEADS:
            head = HEADS[recipe.head](self, images, recipe, fit or HeadFit())
        else:
            head = load_head(Path(recipe.head))
        head.check(self.module.feature_dim, images.class_names, recipe.head)
        self.module.head = head.requires_grad_(recipe.train_head).to(self.device)
        check_task(task, self, self.device)

    def check(self, task: Task) -> None:
        images = self._images(task)
        if self.head is None:
            raise DeltaflError(f'model "{self.origin}" has no {HEAD_FILE}; give a head with --head')
        self.head.check(self.module.feature_dim, images.class_names, f"of {self.origin}")
        check_task(task, self, self.device)

    def _images(self, task: Task) -> ImageTask:
        if not isinstance(task, ImageTask):
            raise DeltaflError(f'model "{self.origin}" takes images; task "{task.name}" has none')
        return task


HEADS: Registry[Callable[[ClassifierNet, ImageTask, HeadRecipe, HeadFit], Head]] = Registry("head")
"""How a classifier gets its head, under the name of a recipe."""
