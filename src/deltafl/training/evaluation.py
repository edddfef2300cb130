"""Heads for a model and a task, and the accuracy of both together."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from deltafl.algebra.tensors import device_named
from deltafl.errors import DeltaflError, did_you_mean
from deltafl.models import LoadedEncoder, load_encoder
from deltafl.models.flat import FlatModel
from deltafl.models.heads import (
    HEAD_FILE,
    ZERO_SHOT,
    LinearHead,
    check_head,
    few_per_class,
    load_head,
    random_head,
)
from deltafl.models.ridge import RidgeStatistics, ridge_head
from deltafl.models.zero_shot import read_templates, zero_shot_head
from deltafl.seeding import keyed_generator
from deltafl.tasks.arrays import Task
from deltafl.training.legacy import extract_features, predict_correct
from deltafl.training.recipe import PRECISIONS, FinetuneRecipe


def make_head(model: FlatModel, task: Task, recipe: FinetuneRecipe) -> LinearHead:
    """The head that `recipe.head` names, for this model and task, on the model's device, frozen.

    Ridge: statistics of the training split (or of `few_shot` examples per class), strength and temperature chosen on
    validation. Zero-shot: see `zero_shot_for`.

    Raises:
        DeltaflError: a head from a file that does not fit, a model without what a zero-shot head needs.
    """
    dim, names = model.encoder.feature_dim, task.class_names
    if recipe.head == "linear":
        return random_head(dim, names, keyed_generator(recipe.seed, "head")).to(model.device)
    if recipe.head == ZERO_SHOT:
        return zero_shot_for(model.encoder, task, recipe.templates, model.device).to(model.device)
    if recipe.head != "ridge":
        head = load_head(Path(recipe.head))
        check_head(head, dim, names, recipe.head)
        return head.to(model.device)
    ids = torch.arange(len(task.train))
    if recipe.few_shot is not None:
        ids = few_per_class(
            task.train.labels.cpu(), recipe.few_shot, keyed_generator(recipe.seed, "few-shot")
        )
    autocast = PRECISIONS[recipe.mixed_precision]
    features = extract_features(model, task.train, ids, autocast=autocast).cpu()
    statistics = RidgeStatistics.of(features, task.train.labels[ids], len(names))
    val = extract_features(model, task.val, autocast=autocast).cpu()
    return ridge_head(statistics, val, task.val.labels.cpu(), names).to(model.device)


def zero_shot_for(
    encoder: LoadedEncoder,
    task: Task,
    templates: str | None = None,
    device: torch.device | str = "cpu",
) -> LinearHead:
    """The zero-shot head of a CLIP encoder, on the CPU; `templates` is a file of prompts, None: the catalogue's.

    A fine-tuned image tower has no text tower: that of its base (training.json) is used.

    Raises:
        DeltaflError: no CLIP model, or not the whole of one.
    """
    given = None if templates is None else read_templates(templates)
    ref, seen = encoder.origin, set()
    while (file := Path(ref) / "training.json").is_file() and ref not in seen:
        seen.add(ref)
        try:
            ref = json.loads(file.read_text())["base"]["id"] or ref
        except (ValueError, KeyError, TypeError) as error:
            raise DeltaflError(
                f'"{file}" names no base ({error}); a zero-shot head needs its text tower'
            ) from error
    head = zero_shot_head(ref, task.name, task.class_names, templates=given, device=device)
    check_head(head, encoder.feature_dim, task.class_names, f"{ZERO_SHOT} of {ref}")
    return head


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
