"""`load_task`: from what a user writes to a `Task`."""

import re
from dataclasses import replace
from itertools import chain
from pathlib import Path

import PIL
import torch

from deltafl.errors import DeltaflError
from deltafl.tasks.cache import Made, kept
from deltafl.tasks.digits import digits
from deltafl.tasks.find import Found, find
from deltafl.tasks.harness import load_harness
from deltafl.tasks.images import Images, ImageTask
from deltafl.tasks.inputs import ImageInput, TextInput
from deltafl.tasks.lines import load_lines
from deltafl.tasks.recipe import DataRecipe, TrainingDataRecipe
from deltafl.tasks.selection import select
from deltafl.tasks.task import SPLITS, Task
from deltafl.tasks.text_loading import HELD_OUT, load_text
from deltafl.usercode import find_callable, importable

MODULE_ATTR = r"[A-Za-z_][\w.]*:[A-Za-z_]\w*"


def load_task(data: DataRecipe | str, inputs: ImageInput | TextInput, seed: int = 0) -> Task:
    """The task that `data` names (see `DataRecipe`) in the form that a model takes: images decoded
    and resized once to uint8 (N, channels, image_size, image_size), lines of text tokenised.

    The test split is the data's own. So is val where there is one ("validation", "valid", "val",
    "dev"); else it is held out of train: stratified, min(val_fraction N, 5000) rows, chosen by
    `seed`. `limit` then keeps a stratified choice of each split. Rows keep the order of their
    files. Images from files or the hub are cached in `$DELTAFL_CACHE`, or `~/.cache/deltafl`, and
    memory-mapped.

    Raises:
        DeltaflError: whatever is wrong with the settings, the data or the cache folder, in one
        line.
    """
    recipe = DataRecipe.of(data=data) if isinstance(data, str) else data
    spec = recipe.data
    kind, _, target = spec.partition(":")
    builtin = kind in ("hub", "parquet", "folder", "lines", "digits", "harness")
    if re.fullmatch(MODULE_ATTR, spec) and not builtin and not Path(spec).exists():
        task = _user_task(spec, inputs, seed)
    elif isinstance(inputs, TextInput) and kind == "harness":
        task = load_harness(target, inputs, recipe.val_fraction or HELD_OUT, seed)
    elif isinstance(inputs, TextInput):
        lines = kind == "lines" or any(Path(spec).expanduser().glob("train*.txt"))
        if lines or (source := find(recipe, text=True)) is None:
            task = load_lines(spec, inputs, recipe.val_fraction or HELD_OUT, seed)
        else:
            task = load_text(source, recipe, inputs, seed)
    elif inputs.channels not in (1, 3):
        raise DeltaflError(f"images have 1 or 3 channels, not {inputs.channels}")
    elif source := find(recipe):
        task = _images(source, inputs, recipe, seed)
    else:
        task = digits(target, inputs)
    if recipe.limit and max(map(task.size, SPLITS)) > recipe.limit:
        groups = {split: task.groups(split).numpy() for split in SPLITS}
        rows = select(groups, seed, limit=recipe.limit)
        task = task.only({s: torch.from_numpy(some) for s, (_, some) in rows.items()}, task.name)
    if isinstance(recipe, TrainingDataRecipe):
        if isinstance(task, ImageTask):
            return replace(task, augment=recipe.augment, label_smoothing=recipe.label_smoothing)
        if recipe.augment != "none" or recipe.label_smoothing:
            raise DeltaflError(f'task "{task.name}": augment and label_smoothing are for images')
    return task


def _user_task(spec: str, inputs: ImageInput | TextInput, seed: int) -> Task:
    """What `attr` of `module` returns; the working directory is importable meanwhile."""
    function = find_callable(spec, "data")
    with importable():
        try:
            task = function(inputs, seed)
        except TypeError as error:
            raise DeltaflError(
                f'data "{spec}" is called with (inputs, seed); inputs has image_size and channels, '
                f"or tokenizer and max_length: {error}"
            ) from error
    if not isinstance(task, Task):
        raise DeltaflError(
            f'data "{spec}" returned {type(task).__name__}, not a deltafl.tasks.Task; return '
            'ImageTask(name, {"train": Images(images, labels), "val": .., "test": ..}, class_names)'
        )
    return task


def _images(source: Found, inputs: ImageInput, recipe: DataRecipe, seed: int) -> ImageTask:
    shape, columns = (inputs.channels, inputs.image_size, inputs.image_size), recipe.columns()
    fraction = recipe.val_fraction or 0.1

    def make(scratch: Path) -> Made:
        from deltafl.tasks.tables import decoded, open_source

        splits, names = open_source(source, columns, scratch)
        groups = {split: own.labels for split, own in splits.items()}
        rows = select(groups, seed, fraction, recipe.limit)
        chosen = [(splits[origin], some) for origin, some in rows.values()]
        labels = [own.labels[some].tolist() for own, some in chosen]
        parts = chain.from_iterable(decoded(own, some, inputs) for own, some in chosen)
        return Made([names, labels], (sum(map(len, labels)), *shape), parts)

    how = [shape, columns, seed, fraction, recipe.limit, PIL.__version__]
    (names, labels), images = kept([source.key, repr(source.named), how], make)
    parts = map(Images, images.split([*map(len, labels)]), map(torch.tensor, labels))
    return ImageTask(source.name, dict(zip(SPLITS, parts, strict=True)), tuple(names))
