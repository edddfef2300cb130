"""How a classifier gets its head: each way is a function in `HEADS`, under the name of a recipe."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from deltafl.errors import DeltaflError
from deltafl.models.classifier import Classifier
from deltafl.models.head import HEAD_FILE, Head, load_head, save_head
from deltafl.models.head_recipe import HeadFit, HeadRecipe
from deltafl.models.net import Format, Net
from deltafl.registry import Registry
from deltafl.seeding import keyed_generator
from deltafl.tasks.images import ImageTask
from deltafl.tasks.task import Split, Task

Fit = Callable[[Net, ImageTask, HeadRecipe, HeadFit], Head]

HEADS: Registry[Fit] = Registry("head")


class ClassifierFormat(Format):
    """What image classifiers share: files hold the encoder's names, and the head has its own."""

    def save(self, module: nn.Module, folder: Path) -> None:
        assert isinstance(module, Classifier)
        self.save_encoder(module.encoder, folder)
        self.save_head(module, folder)

    def save_head(self, module: nn.Module, folder: Path) -> None:
        assert isinstance(module, Classifier)
        if module.head is not None:
            save_head(module.head, folder / HEAD_FILE)

    def head_bytes(
        self, module: nn.Module, recipe: HeadRecipe, shards: Sequence[Tensor]
    ) -> tuple[int, int]:
        """Up: for ridge every client's A and b, ((D+1)^2 + (D+1) C) float64 for D features and C
        classes; for a probe D float32 and an int64 label of every example.
        """
        assert isinstance(module, Classifier)
        assert module.head is not None
        features, classes = module.feature_dim, len(module.head.class_names)
        up = {
            "ridge": len(shards) * 8 * ((features + 1) ** 2 + (features + 1) * classes),
            "probe": sum(map(len, shards)) * (4 * features + 8),
        }
        return up.get(recipe.head, 0), 4 * classes * (features + 1)

    def save_encoder(self, encoder: nn.Module, folder: Path) -> None:
        """Write the encoder without a head."""
        super().save(encoder, folder)

    def snapshot(self, module: nn.Module) -> dict[str, Any]:
        head = module.head if isinstance(module, Classifier) else None
        told = head and (head.class_names, head.normalised, head.weight.requires_grad)
        return super().snapshot(module) | {"head": told}

    def restore(self, module: nn.Module, snapshot: Mapping[str, Any]) -> None:
        assert isinstance(module, Classifier)
        if snapshot["head"] is not None and module.head is None:
            (names, normalised, trained), tensors = snapshot["head"], snapshot["tensors"]
            head = Head(tensors["head.weight"], tensors["head.bias"], names, normalised)
            device = next(module.parameters()).device
            module.head = head.requires_grad_(trained).to(device)
        super().restore(module, snapshot)

    apart = ("head.",)

    def file_name(self, name: str) -> str:
        return name.removeprefix("encoder.")

    def prepare(self, net: Net, task: Task, recipe: HeadRecipe, fit: HeadFit) -> None:
        """The head that `recipe` names, one of `HEADS` or a file; it trains if that says so."""
        classifier, task = classifier_of(net), _with_images(net, task)
        if recipe.head in HEADS:
            head = HEADS[recipe.head](net, task, recipe, fit)
        else:
            head = load_head(Path(recipe.head))
        head.check(classifier.feature_dim, task.class_names, recipe.head)
        classifier.head = head.requires_grad_(recipe.train_head).to(net.device)

    def check(self, net: Net, task: Task) -> None:
        features, names = classifier_of(net).feature_dim, _with_images(net, task).class_names
        head_of(net).check(features, names, f"of {net.origin}")


def _with_images(net: Net, task: Task) -> ImageTask:
    if not isinstance(task, ImageTask):
        raise DeltaflError(f'model "{net.origin}" takes images; task "{task.name}" has none')
    return task


def classifier_of(net: Net) -> Classifier:
    """The net's module. Raises DeltaflError if it is no classifier."""
    if not isinstance(net.module, Classifier):
        raise DeltaflError(f'model "{net.origin}" is no image classifier, and has no such head')
    return net.module


def head_of(net: Net) -> Head:
    """The net's head. Raises DeltaflError if it has none."""
    if (head := classifier_of(net).head) is None:
        raise DeltaflError(f'model "{net.origin}" has no {HEAD_FILE}; give a head with --head')
    return head


@torch.inference_mode()
def features_of(
    net: Net,
    task: Task,
    split: Split,
    ids: Tensor | None = None,
    autocast: torch.dtype | None = None,
    batch_size: int = 256,
) -> Tensor:
    """Features float32 (n, D), on the CPU, of the examples at `ids` (None: all), in eval mode."""
    classifier = classifier_of(net)
    ids = torch.arange(task.size(split)) if ids is None else ids
    was_training = classifier.training
    classifier.eval()
    parts = [torch.empty(0, classifier.feature_dim)]
    for part in ids.split(batch_size) if len(ids) else ():
        images = task.batch(split, part, net.device)["images"]
        with torch.autocast(net.device.type, autocast, enabled=autocast is not None):
            parts.append(classifier.features(images).float().cpu())
    classifier.train(was_training)
    return torch.cat(parts)


def rows_of(task: Task, fit: HeadFit) -> list[Tensor]:
    """The training examples of each client; all of them in one place without shards."""
    return [torch.arange(task.size("train"))] if fit.shards is None else list(fit.shards)


def accuracy_of(head: Head, features: Tensor, labels: Tensor) -> float:
    """Share of features (n, D) whose largest logit is the label's."""
    return (head(features).argmax(1) == labels).double().mean().item()


@HEADS.register("linear")
def _linear(net: Net, task: ImageTask, recipe: HeadRecipe, fit: HeadFit) -> Head:
    dim = classifier_of(net).feature_dim
    return random_head(dim, task.class_names, keyed_generator(fit.seed, "head"))


def random_head(feature_dim: int, class_names: Sequence[str], generator: torch.Generator) -> Head:
    """Weights uniform in +-1/sqrt(D), as torch.nn.Linear draws them, bias 0."""
    bound = feature_dim**-0.5
    weight = torch.empty(len(class_names), feature_dim).uniform_(-bound, bound, generator=generator)
    return Head(weight, torch.zeros(len(class_names)), class_names)
