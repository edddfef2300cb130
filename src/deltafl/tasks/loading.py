"""`load_task`: from what a user writes to a `Task`."""

import logging
import re
from dataclasses import replace
from inspect import signature
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import PIL
import torch

from deltafl.errors import DeltaflError, did_you_mean, shorten
from deltafl.tasks.cache import Made, kept
from deltafl.tasks.decoding import decoded
from deltafl.tasks.find import find
from deltafl.tasks.images import Images, ImageTask, check_labels
from deltafl.tasks.inputs import ImageInput, TextInput
from deltafl.tasks.lines import load_lines
from deltafl.tasks.raw import FAMILIES, RawTask, Source
from deltafl.tasks.recipe import DataRecipe, TrainingDataRecipe
from deltafl.tasks.selection import select
from deltafl.tasks.task import SPLITS, Task
from deltafl.usercode import find_callable, importable

log = logging.getLogger(__name__)

MODULE_ATTR = r"[A-Za-z_][\w.]*:[A-Za-z_]\w*"


def load_task(data: DataRecipe | str, inputs: ImageInput | TextInput, seed: int = 0) -> Task:
    """The task that `data` names (see `DataRecipe`) in the form that a model takes: images decoded and
    resized once to uint8 (N, channels, image_size, image_size), lines of text tokenised.

    The test split is the data's own. So is val where there is one ("validation", "valid", "val",
    "dev"); else it is held out of train: stratified, min(val_fraction N, 5000) rows, chosen by
    `seed`. `limit` then keeps a stratified choice of each split. Rows keep the order of their files.
    Images from files or the hub are cached in `$DELTAFL_CACHE`, or `~/.cache/deltafl`, and
    memory-mapped.

    Raises:
        DeltaflError: whatever is wrong with the settings, the data or the cache folder, in one line.
    """
    recipe = DataRecipe.of(data=data) if isinstance(data, str) else data
    spec = recipe.data
    if "?" in spec:
        raise DeltaflError(
            f'data "{spec}": what follows "?" has keys of its own now: image_column (for image), '
            "label_column (for label), revision, data_dir; and options, --image-column .."
        )
    builtin = spec.partition(":")[0] in ("hub", "parquet", "folder", "lines", *FAMILIES)
    if re.fullmatch(MODULE_ATTR, spec) and not builtin and not Path(spec).exists():
        task = _limited(_user_task(spec, inputs, seed), recipe, seed)
    elif isinstance(inputs, TextInput):
        task = _limited(load_lines(spec, inputs, recipe.val_fraction, seed), recipe, seed)
    else:
        task = _images(find(recipe), inputs, recipe, seed)
    if not isinstance(recipe, TrainingDataRecipe):
        return task
    if isinstance(task, ImageTask):
        return replace(task, augment=recipe.augment, label_smoothing=recipe.label_smoothing)
    if recipe.augment != "none" or recipe.label_smoothing:
        raise DeltaflError(f'task "{task.name}": augment and label_smoothing are for images')
    return task


def _user_task(spec: str, inputs: ImageInput | TextInput, seed: int) -> Task:
    """What `attr` of `module` returns; the working directory is importable meanwhile."""
    try:
        function = find_callable(spec, "data")
    except DeltaflError as error:
        hint = did_you_mean(spec.partition(":")[0], FAMILIES)
        raise DeltaflError(f"{error}; {hint}") from error
    try:
        signature(function).bind(inputs, seed)
    except TypeError as error:
        raise DeltaflError(
            f'data "{spec}" is called with (inputs, seed); inputs has image_size and channels, or '
            f"tokenizer and max_length: {error}"
        ) from error
    with importable():
        task = function(inputs, seed)
    if not isinstance(task, Task):
        raise DeltaflError(
            f'data "{spec}" returned {type(task).__name__}, not a deltafl.tasks.Task; return '
            'ImageTask(name, {"train": Images(images, labels), "val": .., "test": ..}, class_names)'
        )
    return task


def _limited(task: Task, recipe: DataRecipe, seed: int) -> Task:
    if recipe.limit is None:
        return task
    groups = {split: task.groups(split).numpy() for split in SPLITS}
    rows = select(groups, seed, limit=recipe.limit)
    return task.only({s: torch.from_numpy(some) for s, (_, some) in rows.items()}, task.name)


def _images(source: Source, inputs: ImageInput, recipe: DataRecipe, seed: int) -> ImageTask:
    if inputs.channels not in (1, 3):
        raise DeltaflError(f"images have 1 or 3 channels, not {inputs.channels}")
    shape = (inputs.channels, inputs.image_size, inputs.image_size)

    def make(scratch: Path) -> Made:
        raw = source.open(scratch)
        _check_raw(source.name, raw)
        groups = {split: own.labels for split, own in raw.splits.items()}
        rows = select(groups, seed, recipe.val_fraction, recipe.limit)
        chosen = [rows[split] for split in SPLITS]
        labels = [groups[origin][some].tolist() for origin, some in chosen]
        parts = (decoded(raw.splits[origin], some, inputs) for origin, some in chosen)
        about = {"class_names": raw.class_names, "labels": labels}
        return Made(about, (sum(map(len, labels)), *shape), chain.from_iterable(parts))

    if source.key:
        how = [shape, seed, recipe.val_fraction, recipe.limit, PIL.__version__]
        about, images = kept({"source": source.key, "how": how}, make)
    else:
        with TemporaryDirectory() as scratch:
            made = make(Path(scratch))
            about, images = made.about, torch.from_numpy(np.concatenate([*made.parts]))
    labels = about["labels"]
    parts = map(Images, images.split([*map(len, labels)]), map(torch.tensor, labels))
    return ImageTask(source.name, dict(zip(SPLITS, parts, strict=True)), (*about["class_names"],))


def _check_raw(name: str, raw: RawTask) -> None:
    for split in ("train", "test"):
        if split not in raw.splits:
            raise DeltaflError(
                f'data "{name}" has no {split} split (it has: '
                f"{', '.join(sorted(raw.splits)) or 'none'}). A task trains on train and is judged "
                "on test; divide the data first."
            )
    for own in raw.splits.values():
        check_labels(torch.from_numpy(own.labels), len(raw.class_names), own.where)
    trained = set(raw.splits["train"].labels.tolist())
    if empty := [own for label, own in enumerate(raw.class_names) if label not in trained]:
        log.warning("%s: no training example of %s", name, shorten(empty))
