"""`load_task`: from what a user writes to a `Task`."""

import logging
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import get_args

import numpy as np
import PIL
import torch

from deltafl.errors import DeltaflError, shorten
from deltafl.tasks import cache
from deltafl.tasks.arrays import Split, Task
from deltafl.tasks.decoding import Geometry, Resize, decoded
from deltafl.tasks.selection import Selection, select
from deltafl.tasks.source import RawTask, Source
from deltafl.tasks.spec import find

log = logging.getLogger(__name__)

FORMAT = 1
"""Raise it when the bytes that a cache entry should hold change: old entries are then not found."""


def load_task(
    spec: str,
    *,
    image_size: int,
    channels: int = 3,
    resize: Resize = "crop",
    val_fraction: float = 0.1,
    val_most: int = 5000,
    seed: int = 0,
    limit: int | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    data_dir: str | Path | None = None,
    cache_dir: Path | None = None,
) -> Task:
    """The task that `spec` names, decoded and resized once to uint8 (N, channels, image_size, image_size).

    `spec` is, in this order of precedence:

    - `hub:owner/name[:config]`, a data set of the Hugging Face hub;
    - `parquet:PATH` or `folder:PATH`, the same as PATH, for names that look like something else;
    - a registered family, `digits` or `digits:VARIANT`;
    - PATH, a folder with `train*.parquet` and `test*.parquet` or with `train/CLASS/*.png` and `test/CLASS/*.png`;
      `PATH/NAME` takes `NAME_train.parquet`, `NAME_test.parquet` and `NAME_classes.json` out of a folder of many;
    - the name of a task in `deltafl.tasks.catalogue`, such as `cifar100`: its hub set and columns;
    - `module:attr`, a function `(image_size, channels, seed) -> Task` importable from the working directory.

    With `data_dir` (or `?data_dir=DIR` after the name) a task by name comes from `data_dir/NAME`, a folder of Parquet
    files or images, or from `data_dir/NAME_train.parquet` and the like. That goes before a folder of that name in the
    working directory; what is not a name is then a mistake.

    `?image=COLUMN&label=COLUMN&revision=REVISION` after any but a family and a function overrides `image_column` and
    `label_column` (None: "image" and "label", or the catalogue's) and the revision of a hub set.

    The test split is the data's own. So is val where there is one ("validation", "valid", "val", "dev"); else it is
    held out of train: stratified, min(val_fraction * N, val_most) rows, chosen by `seed`. `limit` then keeps a
    stratified choice of at most so many rows of each split. Rows keep the order of their files. What comes from
    files or the hub is cached under `cache_dir` (default `$DELTAFL_CACHE` or `~/.cache/deltafl`) and memory-mapped.

    Raises:
        DeltaflError: whatever is wrong with the spec, the data or the cache folder, in one line.
    """
    if channels not in (1, 3) or image_size < 1 or resize not in get_args(Resize):
        raise DeltaflError(
            f"image_size={image_size}, channels={channels}, resize={resize!r}: images have a positive size, "
            "1 or 3 channels, and are resized by crop or stretch."
        )
    if not 0 < val_fraction < 1 or val_most < 1 or (limit is not None and limit < 1):
        raise DeltaflError(
            f"val_fraction={val_fraction}, val_most={val_most}, limit={limit}: the fraction is between 0 and 1, "
            "the counts are positive."
        )
    geometry, selection = (
        Geometry(image_size, channels, resize),
        Selection(val_fraction, val_most, seed, limit),
    )
    found = find(spec, {"image": image_column, "label": label_column}, data_dir)
    if isinstance(found, Source):
        return _from_source(found, geometry, selection, cache_dir or cache.default_cache_dir())
    return _limited(
        _checked(found(image_size=image_size, channels=channels, seed=seed), geometry), selection
    )


def _from_source(source: Source, geometry: Geometry, selection: Selection, folder: Path) -> Task:
    if not (source.files or source.fingerprint):
        with TemporaryDirectory() as scratch:
            class_names, parts = _chosen(source, Path(scratch), geometry, selection)
            splits = {
                split: Split(
                    torch.from_numpy(np.concatenate(list(batches))), torch.from_numpy(labels)
                )
                for split, (labels, batches) in parts.items()
            }
        return Task(source.name, **splits, class_names=class_names)
    with cache.writing_to(folder):
        content = cache.content_hash(source.files, folder) if source.files else ""
    made_of = {"name": source.name, "content": content, "fingerprint": source.fingerprint}
    how = {
        "geometry": asdict(geometry),
        "selection": asdict(selection),
        "pillow": PIL.__version__,
        "format": FORMAT,
    }
    key = cache.key_of(made_of | how)
    if (task := cache.read(folder, key)) is not None:
        log.info("%s: from the cache, %s", source.name, folder / key)
        return task
    started = time.perf_counter()
    with TemporaryDirectory(dir=folder) as scratch:
        class_names, parts = _chosen(source, Path(scratch), geometry, selection)
        cache.write(
            folder,
            key,
            source.name,
            class_names,
            parts,
            (geometry.channels, geometry.size, geometry.size),
        )
    log.info(
        "%s: decoded in %.1f s into %s", source.name, time.perf_counter() - started, folder / key
    )
    if (task := cache.read(folder, key)) is None:
        raise DeltaflError(
            f'cache folder "{folder}" does not give back what was written. Is the disk failing?'
        )
    return task


def _chosen(
    source: Source, scratch: Path, geometry: Geometry, selection: Selection
) -> tuple[tuple[str, ...], dict[str, tuple[np.ndarray, Iterator[np.ndarray]]]]:
    """Class names, and for each split its labels and batches of decoded images."""
    raw = source.open(scratch)
    _check_raw(source.name, raw)
    rows = select({split: own.labels for split, own in raw.splits.items()}, selection)
    return raw.class_names, {
        split: (raw.splits[origin].labels[some], decoded(raw.splits[origin], some, geometry))
        for split, (origin, some) in rows.items()
    }


def _check_raw(name: str, raw: RawTask) -> None:
    for split in ("train", "test"):
        if split not in raw.splits:
            raise DeltaflError(
                f'data set "{name}" has no {split} split (it has: {", ".join(sorted(raw.splits)) or "none"}). '
                "A task trains on train and is judged on test; divide the data first."
            )
    for own in raw.splits.values():
        _check_labels(own.labels, len(raw.class_names), own.where)
    if empty := sorted(set(range(len(raw.class_names))) - set(raw.splits["train"].labels.tolist())):
        log.warning(
            "%s: no training example of %s", name, shorten([raw.class_names[c] for c in empty])
        )


def _check_labels(labels: np.ndarray, classes: int, where: str) -> None:
    if not len(labels):
        raise DeltaflError(f"{where} is empty. Every split of a task needs examples.")
    wrong = np.flatnonzero((labels < 0) | (labels >= classes))
    if len(wrong):
        raise DeltaflError(
            f"{where}: the label of row {wrong[0]} is {labels[wrong[0]]}, but there are {classes} class names "
            f"(0 to {classes - 1}); {len(wrong)} of {len(labels)} labels are outside. "
            "Correct the labels or the list of class names."
        )


def _checked(task: Task, geometry: Geometry) -> Task:
    """A user's own task, if it is of the agreed form."""
    shape = (geometry.channels, geometry.size, geometry.size)
    for name, split in (("train", task.train), ("val", task.val), ("test", task.test)):
        where = f'split {name} of data set "{task.name}"'
        if split.images.dtype != torch.uint8 or tuple(split.images.shape[1:]) != shape:
            raise DeltaflError(
                f"{where}: images are {split.images.dtype} {tuple(split.images.shape)}, "
                f"not torch.uint8 (N, {', '.join(map(str, shape))}). Return decoded images of the size asked for."
            )
        if split.labels.dtype != torch.int64 or tuple(split.labels.shape) != (len(split.images),):
            raise DeltaflError(
                f"{where}: labels are {split.labels.dtype} {tuple(split.labels.shape)}, "
                f"not torch.int64 ({len(split.images)},), one for each image."
            )
        _check_labels(split.labels.numpy(), len(task.class_names), where)
    return task


def _limited(task: Task, selection: Selection) -> Task:
    if selection.limit is None:
        return task
    splits = {"train": task.train, "val": task.val, "test": task.test}
    rows = select({name: split.labels.numpy() for name, split in splits.items()}, selection)
    cut = {
        name: Split(splits[name].images[some], splits[name].labels[some])
        for name, (_, some) in rows.items()
    }
    return replace(task, **cut)
