"""Heads for a model and a task, and the accuracy of both together."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from deltafl.algebra.tensors import device_named
from deltafl.errors import DeltaflError, did_you_mean
from deltafl.models import LoadedEncoder, load_encoder
from deltafl.models.bridge import net_of
from deltafl.models.fit import classifier_of
from deltafl.models.flat import FlatModel
from deltafl.models.head_recipe import HeadFit, HeadRecipe
from deltafl.models.heads import HEAD_FILE, ZERO_SHOT, LinearHead, check_head, load_head
from deltafl.tasks.arrays import Task, image_task
from deltafl.training.legacy import predict_correct
from deltafl.training.recipe import PRECISIONS, FinetuneRecipe


def make_head(model: FlatModel, task: Task, recipe: FinetuneRecipe) -> LinearHead:
    """The head that `recipe.head` names, for this model and task, on the model's device, frozen.

    Raises:
        DeltaflError: a head from a file that does not fit, a model without what a zero-shot head needs.
    """
    net = net_of(model.encoder)
    kind = HeadRecipe.of(head=recipe.head, few_shot=recipe.few_shot, templates=recipe.templates)
    autocast = PRECISIONS[recipe.mixed_precision]
    net.prepare(image_task(task), kind, HeadFit(recipe.seed, autocast=autocast))
    head = classifier_of(net).head
    assert head is not None
    return LinearHead.of(head)


def zero_shot_for(
    encoder: LoadedEncoder,
    task: Task,
    templates: str | None = None,
    device: torch.device | str = "cpu",
) -> LinearHead:
    """The zero-shot head of a CLIP encoder; `templates` is a file of prompts, None: the catalogue's.

    Raises:
        DeltaflError: no CLIP model, or not the whole of one.
    """
    net = net_of(encoder)
    net.prepare(image_task(task), HeadRecipe.of(head=ZERO_SHOT, templates=templates))
    head = classifier_of(net).head
    assert head is not None
    return LinearHead.of(head)


@dataclass(frozen=True)
class Evaluation:
    """Accuracy over the n examples of a split; `correct` is uint8 (n,)."""

    accuracy: float
    correct: Tensor


def evaluate(
    model: str | Path | LoadedEncoder,
    task: Task,
    split: str = "test",
    *,
    head: LinearHead | str | Path | None = None,
    templates: str | None = None,
    batch_size: int = 256,
    device: str | None = None,
    mixed_precision: str = "no",
) -> Evaluation:
    """Accuracy of a model on "val" or "test" of a task, with `head` or the head.safetensors in its directory.

    head: a head, a file, or "zero-shot", for which `templates` may name a file of prompts.

    Raises:
        DeltaflError: no head, or one of another model or task; unknown split.
    """
    if split not in ("val", "test"):
        raise DeltaflError(f'unknown split "{split}"; {did_you_mean(split, ("val", "test"))}')
    encoder = model if isinstance(model, LoadedEncoder) else load_encoder(model)
    if templates is not None and head != ZERO_SHOT:
        raise DeltaflError("templates are about the zero-shot head; give --head zero-shot too")
    if head == ZERO_SHOT:
        head = zero_shot_for(encoder, task, templates)
    elif not isinstance(head, LinearHead):
        path = Path(head) if head is not None else Path(encoder.origin) / HEAD_FILE
        if head is None and not path.is_file():
            raise DeltaflError(
                f'model "{encoder.origin}" has no {HEAD_FILE}; give a head with --head'
            )
        head = load_head(path)
    check_head(head, encoder.feature_dim, task.class_names, f"of {encoder.origin}")
    if device is not None:
        device_named(device)
    where = device or ("cuda" if torch.cuda.is_available() else "cpu")
    flat = FlatModel(encoder.copy_to(where))
    examples = task.val if split == "val" else task.test
    correct = predict_correct(
        flat, head, examples, batch_size=batch_size, autocast=PRECISIONS[mixed_precision]
    )
    return Evaluation(correct.double().mean().item(), correct)
