"""An image classifier: an encoder and the linear head on its features, one module."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from deltafl.errors import DeltaflError
from deltafl.models.fit import fitted_head, random_head
from deltafl.models.head import HEAD_FILE, Head, HeadFit, HeadRecipe, load_head
from deltafl.models.net import Net
from deltafl.models.zero_shot import zero_shot_head
from deltafl.seeding import keyed_generator
from deltafl.tasks.images import ImageTask
from deltafl.tasks.inputs import ImageInput
from deltafl.tasks.task import Task, check_task


class Classifier(nn.Module):
    """uint8 images (B, C, H, W) -> logits (B, K).

    Features (B, D) of normalised images are `encoder.embed(x)` where there is one, else
    `encoder(x)`; of what transformers gives the projected or pooled embedding, else the class
    token. `encoder` is changed in place: float32, eval mode, and what the features do not depend
    on (a mask token, an unused classifier) is frozen: weight decay would otherwise move it, and a
    delta would hold training that never happened. `origin`: the folder whose head is taken, if it
    has one.

    Raises:
        DeltaflError: the features of one image are not (1, D).
    """

    def __init__(self, encoder: nn.Module, inputs: ImageInput, origin: str) -> None:
        super().__init__()
        self.encoder = encoder.float().eval()
        self.inputs = inputs
        parameters = [p for p in encoder.parameters() if p.requires_grad]
        with torch.enable_grad():
            shape = 1, inputs.channels, inputs.image_size, inputs.image_size
            features = self.features(torch.zeros(shape, dtype=torch.uint8))
            found = tuple(features.shape) if isinstance(features, Tensor) else ()
            if len(found) != 2 or found[0] != 1:
                raise DeltaflError(
                    f'model "{origin}": one image gives {found or type(features)}, features must '
                    "be (1, D); add `.embed(x)`"
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
        match getattr(self.encoder, "embed", self.encoder)(self.inputs.normalise(images)):
            case {"image_embeds": features} | {"pooler_output": features}:
                return features
            case {"last_hidden_state": hidden}:
                return hidden[:, 0]
            case features:
                return features

    def forward(self, images: Tensor) -> Tensor:
        if self.head is None:
            raise DeltaflError("the model has no head yet; fit one, or give it with --head")
        return self.head(self.features(images))


class ClassifierNet(Net):
    """A net of a `Classifier`: files hold the encoder's names, and the head has its own."""

    module: Classifier
    inner = "encoder."
    takes_head = True

    @property
    def head(self) -> Head | None:
        return self.module.head

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
        if told := snapshot["head"]:
            (names, normalised, trained), tensors = told, snapshot["tensors"]
            head = Head(tensors["head.weight"], tensors["head.bias"], names, normalised)
            self.module.head = head.requires_grad_(trained).to(self.device)
        super().restore(snapshot)

    def prepare(self, task: Task, recipe: HeadRecipe, fit: HeadFit | None = None) -> None:
        """The head that `recipe` names; it trains if that says so."""
        images, fit, features = self._images(task), fit or HeadFit(), self.module.feature_dim
        match recipe.head:
            case "ridge" | "probe":
                head = fitted_head(self.module.eval().features, images, recipe, fit, self.device)
            case "linear":
                generator = keyed_generator(fit.seed, "head")
                head = random_head(features, images.class_names, generator)
            case "zero-shot":
                head = zero_shot_head(self.origin, images, recipe.templates, self.device)
            case file:
                head = load_head(Path(file))
        head.check(features, images.class_names, recipe.head)
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
