"""`load_task`: from what a user writes to a `Task`."""

import logging
import re
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.parse import parse_qsl

import numpy as np
import PIL
import torch

from deltafl.errors import DeltaflError, shorten
from deltafl.tasks.cache import Array, Made, content_hash, default_cache_dir, kept, writing_to
from deltafl.tasks.decoding import decoded
from deltafl.tasks.find import find
from deltafl.tasks.images import Images, ImageTask, check_labels
from deltafl.tasks.inputs import ImageInput, TextInput
from deltafl.tasks.lines import load_lines
from deltafl.tasks.raw import FAMILIES, RawTask, Source
from deltafl.tasks.recipe import DataRecipe, TrainingDataRecipe
from deltafl.tasks.selection import select
from deltafl.tasks.task import SPLITS, Task
from deltafl.tasks.user import user_task

log = logging.getLogger(__name__)

MODULE_ATTR = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


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
    kind, colon, target = spec.partition(":")
    location, mark, query = spec.partition("?")
    if mark:
        keys = {"image": "image_column", "label": "label_column"}
        moved = [f"{keys.get(key, key)}: {value}" for key, value in parse_qsl(query)]
        raise DeltaflError(
            f'data "{spec}": what follows "?" has keys and options of its own; write data: '
            f"{location}, {', '.join(moved)} (options: --image-column ..)"
        )
    builtin = kind in ("hub", "parquet", "folder", "lines", *FAMILIES) or Path(spec).exists()
    if MODULE_ATTR.fullmatch(spec) and not builtin:
        task = _limited(user_task(spec, inputs, seed), recipe, seed)
    elif isinstance(inputs, TextInput):
        if kind != "lines" and (colon or "/" not in spec) and not Path(spec).is_dir():
            raise DeltaflError(
                f'data "{spec}" holds images, and the model takes text; name a folder with '
                "train*.txt and test*.txt, lines:FOLDER"
            )
        folder = Path(target if kind == "lines" and colon else spec).expanduser()
        task = load_lines(folder, inputs, recipe, seed)
    elif kind == "lines" and colon:
        raise DeltaflError(f'data "{spec}" holds lines of text, and the model takes images')
    else:
        task = _images(find(recipe), inputs, recipe, seed)
    return _trained_as(task, recipe)


def _trained_as(task: Task, recipe: DataRecipe) -> Task:
    if not isinstance(recipe, TrainingDataRecipe):
        return task
    if isinstance(task, ImageTask):
        return replace(task, augment=recipe.augment, label_smoothing=recipe.label_smoothing)
    if recipe.augment != "none" or recipe.label_smoothing:
        raise DeltaflError(f'task "{task.name}": augment and label_smoothing are for images')
    return task


def _limited(task: Task, recipe: DataRecipe, seed: int) -> Task:
    """A user's own task, less what `limit` leaves out."""
    if recipe.limit is None:
        return task
    groups = {split: task.groups(split).numpy() for split in SPLITS}
    rows = select(groups, seed, limit=recipe.limit)
    return task.only({s: torch.from_numpy(some) for s, (_, some) in rows.items()}, task.name)


def _images(source: Source, inputs: ImageInput, recipe: DataRecipe, seed: int) -> ImageTask:
    shape = (inputs.channels, inputs.image_size, inputs.image_size)
    if inputs.channels not in (1, 3):
        raise DeltaflError(f"images have 1 or 3 channels, not {inputs.channels}")

    def make(scratch: Path) -> Made:
        raw = source.open(scratch)
        _check_raw(source.name, raw)
        labels = {split: own.labels for split, own in raw.splits.items()}
        rows = select(labels, seed, recipe.val_fraction, recipe.limit)
        arrays = {}
        for split, (origin, some) in rows.items():
            images = decoded(raw.splits[origin], some, inputs)
            arrays[f"{split}_images"] = Array((len(some), *shape), np.uint8, images)
            arrays[f"{split}_labels"] = Array((len(some),), np.int64, [labels[origin][some]])
        return {"class_names": raw.class_names}, arrays

    if source.files or source.fingerprint:
        folder = default_cache_dir()
        with writing_to(folder):
            content = content_hash(source.files, folder) if source.files else ""
        of = {"name": source.name, "content": content, "fingerprint": source.fingerprint}
        how = {"shape": shape, "seed": seed, "val": recipe.val_fraction, "limit": recipe.limit}
        about, arrays = kept(of | how | {"pillow": PIL.__version__}, make)
    else:
        with TemporaryDirectory() as scratch:
            about, made = make(Path(scratch))
            arrays = {name: np.concatenate([*array.parts]) for name, array in made.items()}
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    splits = {s: Images(tensors[f"{s}_images"], tensors[f"{s}_labels"]) for s in SPLITS}
    return ImageTask(source.name, splits, tuple(about["class_names"]))


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
    if empty := sorted(set(range(len(raw.class_names))) - set(raw.splits["train"].labels.tolist())):
        log.warning(
            "%s: no training example of %s", name, shorten([raw.class_names[c] for c in empty])
        )
