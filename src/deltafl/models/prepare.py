"""The head of a classifier for a task: fitted, random, from text or from a file."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from deltafl.errors import DeltaflError
from deltafl.models.classifier import Classifier, Head
from deltafl.models.head_recipe import HeadFit, HeadRecipe
from deltafl.models.heads import LinearHead, check_head, few_per_class, load_head, random_head
from deltafl.models.net import Format, Net
from deltafl.models.probe import probe_head
from deltafl.models.ridge import RidgeStatistics, ridge_head
from deltafl.models.zero_shot import read_templates, zero_shot_head
from deltafl.registry import Registry
from deltafl.seeding import keyed_generator
from deltafl.tasks.images import ImageTask
from deltafl.tasks.task import Split, Task

Fit = Callable[[Classifier, str, ImageTask, HeadRecipe, HeadFit], LinearHead]
"""(classifier, its origin, task, recipe, fit) -> the head."""

HEADS: Registry[Fit] = Registry("head")


class ClassifierFormat(Format):
    """What image classifiers share: files hold the encoder's names, and the head is fitted on a task."""

    def file_name(self, name: str) -> str:
        return name.removeprefix("encoder.")

    def prepare(self, net: Net, task: Task, recipe: HeadRecipe, fit: HeadFit) -> None:
        classifier = net.module
        if not isinstance(classifier, Classifier) or not isinstance(task, ImageTask):
            raise DeltaflError(f'model "{net.origin}" classifies images; "{task.name}" holds none')
        head = HEADS[recipe.head if recipe.head in HEADS else "file"](
            classifier, net.origin, task, recipe, fit
        )
        check_head(head, classifier.feature_dim, task.class_names, recipe.head)
        module = Head(head.weight, head.bias, head.class_names, head.normalised)
        classifier.head = module.requires_grad_(recipe.train_head).to(net.device)


@torch.inference_mode()
def features_of(
    classifier: Classifier,
    task: Task,
    split: Split,
    ids: Tensor | None = None,
    autocast: torch.dtype | None = None,
    batch_size: int = 256,
) -> Tensor:
    """Features float32 (n, D), on the CPU, of the examples at `ids` (None: all), in eval mode."""
    device = next(classifier.parameters()).device
    ids = torch.arange(task.size(split)) if ids is None else ids
    was_training = classifier.training
    classifier.eval()
    parts = []
    for part in ids.split(batch_size):
        images = task.batch(split, part, device)["images"]
        with torch.autocast(device.type, autocast, enabled=autocast is not None):
            parts.append(classifier.features(images).float().cpu())
    classifier.train(was_training)
    return torch.cat(parts) if parts else torch.empty(0, classifier.feature_dim)


@HEADS.register("linear")
def _linear(
    classifier: Classifier, origin: str, task: ImageTask, recipe: HeadRecipe, fit: HeadFit
) -> LinearHead:
    generator = keyed_generator(fit.seed, "head")
    return random_head(classifier.feature_dim, task.class_names, generator)


@HEADS.register("ridge")
def _ridge(
    classifier: Classifier, origin: str, task: ImageTask, recipe: HeadRecipe, fit: HeadFit
) -> LinearHead:
    """Statistics of each client (or of `few_shot` examples a class), added; strength and temperature
    chosen on validation: the closed form of the union, however it is sharded.
    """
    labels, count = task.groups("train"), len(task.class_names)
    shards = [torch.arange(len(labels))] if fit.shards is None else fit.shards
    if recipe.few_shot is not None:
        few = few_per_class(labels, recipe.few_shot, keyed_generator(fit.seed, "few-shot"))
        shards = [rows[torch.isin(rows, few)] for rows in shards]
    rows = torch.cat(list(shards)).sort().values
    features = features_of(classifier, task, "train", rows, fit.autocast)
    total = None
    for shard in shards:
        at = torch.searchsorted(rows, shard)
        part = RidgeStatistics.of(features[at], labels[shard], count)
        total = part if total is None else total + part
    assert total is not None
    val = features_of(classifier, task, "val", autocast=fit.autocast)
    return ridge_head(total, val, task.groups("val"), task.class_names)


@HEADS.register("probe")
def _probe(
    classifier: Classifier, origin: str, task: ImageTask, recipe: HeadRecipe, fit: HeadFit
) -> LinearHead:
    labels = task.groups("train")
    shards = [torch.arange(len(labels))] if fit.shards is None else fit.shards
    rows = torch.cat(list(shards)).sort().values
    features = features_of(classifier, task, "train", rows, fit.autocast)
    val = features_of(classifier, task, "val", autocast=fit.autocast)
    return probe_head(features, labels[rows], val, task.groups("val"), task.class_names)


@HEADS.register("zero-shot")
def _zero_shot(
    classifier: Classifier, origin: str, task: ImageTask, recipe: HeadRecipe, fit: HeadFit
) -> LinearHead:
    """CLIP's text tower; a fine-tuned image tower has none: that of its base is used."""
    given = None if recipe.templates is None else read_templates(recipe.templates)
    ref, seen = origin, set()
    while (file := Path(ref) / "training.json").is_file() and ref not in seen:
        seen.add(ref)
        try:
            ref = json.loads(file.read_text())["base"]["id"] or ref
        except (ValueError, KeyError, TypeError) as error:
            raise DeltaflError(
                f'"{file}" names no base ({error}); a zero-shot head needs its text tower'
            ) from error
    device = next(classifier.parameters()).device
    return zero_shot_head(ref, task.name, task.class_names, templates=given, device=device)


@HEADS.register("file")
def _file(
    classifier: Classifier, origin: str, task: ImageTask, recipe: HeadRecipe, fit: HeadFit
) -> LinearHead:
    return load_head(Path(recipe.head))
