"""Data sets in folders: Parquet files in the Hugging Face layout, or images in `train/CLASS/` and `test/CLASS/`."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from deltafl.errors import DeltaflError, did_you_mean
from deltafl.tasks.huggingface import SPLIT_NAMES, Columns, quiet, raw_task
from deltafl.tasks.source import RawSplit, RawTask, Source

if TYPE_CHECKING:
    from datasets import DatasetDict

PARQUET_NAME = re.compile(
    rf"(?:(?P<prefix>.+)[-_.])?(?P<split>{'|'.join(SPLIT_NAMES)})(?:[-_.].*)?\.parquet"
)
"""`train.parquet`, `train-00000-of-00002.parquet`, `cifar100_train.parquet`: prefix (a set's name) and split."""

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}


def local_source(path: Path, image_column: Columns, label_column: Columns) -> Source:
    """The data set in folder `path`, or the set `path.name` among several in folder `path.parent`.

    Raises:
        DeltaflError: there is no such folder or set, the folder holds several sets, or it holds none.
    """
    if path.is_dir():
        sets = parquet_sets(path) or parquet_sets(path / "data")
        if len(sets) > 1:
            known = ", ".join(f'"{path / name}"' for name in sorted(sets))
            raise DeltaflError(
                f'folder "{path}" holds several data sets; name one of them: {known}.'
            )
        for prefix, files in sets.items():
            return _parquet_source(prefix or path.resolve().name, files, image_column, label_column)
        return _image_folder_source(path)
    sets = parquet_sets(path.parent)
    if path.name in sets:
        return _parquet_source(path.name, sets[path.name], image_column, label_column)
    if sets:
        raise DeltaflError(
            f'folder "{path.parent}" has no data set "{path.name}"; {did_you_mean(path.name, sets)}'
        )
    raise DeltaflError(
        f'there is no folder "{path}", and no Parquet file of that name. Check the path.'
    )


def parquet_sets(folder: Path) -> dict[str, dict[str, list[Path]]]:
    """The Parquet files of a folder by set and split: {prefix or "": {split name in the file: files in order}}."""
    sets: dict[str, dict[str, list[Path]]] = {}
    for path in sorted(folder.glob("*.parquet")):
        if match := PARQUET_NAME.fullmatch(path.name):
            sets.setdefault(match["prefix"] or "", {}).setdefault(match["split"], []).append(path)
    return sets


def _parquet_source(
    name: str, files: Mapping[str, list[Path]], image_column: Columns, label_column: Columns
) -> Source:
    folder = next(iter(files.values()))[0].parent
    sidecars = [
        path
        for path in (folder / f"{name}_classes.json", folder / "classes.json")
        if path.is_file()
    ][:1]
    places = {
        split: str(paths[0])
        if len(paths) == 1
        else f'split "{split}" ({paths[0]} and {len(paths) - 1} more)'
        for split, paths in files.items()
    }

    def opened(scratch: Path) -> RawTask:
        names = _class_names(sidecars[0]) if sidecars else None
        return raw_task(_read_parquet(files, scratch), places, image_column, label_column, names)

    every = (*(path for paths in files.values() for path in paths), *sidecars)
    return Source(name, opened, every, fingerprint=f"{image_column} {label_column}")


def _class_names(sidecar: Path) -> list[str]:
    """A JSON list of names, or an object with such a list under "classes"."""
    try:
        content = json.loads(sidecar.read_text())
    except ValueError as error:
        raise DeltaflError(f'"{sidecar}" is not JSON ({error}). Repair or remove it.') from error
    names = content.get("classes") if isinstance(content, dict) else content
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise DeltaflError(
            f'"{sidecar}" must hold a list of class names, or an object with one under "classes".'
        )
    return names


def _image_folder_source(path: Path) -> Source:
    files = {
        folder.name: sorted(p for p in folder.glob("*/*") if p.suffix.lower() in IMAGE_SUFFIXES)
        for folder in sorted(path.iterdir())
        if folder.name in SPLIT_NAMES and folder.is_dir()
    }
    if not any(files.values()):
        raise DeltaflError(
            f'folder "{path}" holds neither Parquet files (train.parquet, test.parquet) nor images '
            "(train/CLASS/*.png, test/CLASS/*.png)."
        )
    class_names = sorted({p.parent.name for paths in files.values() for p in paths})

    def raw_split(split: str) -> RawSplit:
        labels = np.array([class_names.index(p.parent.name) for p in files[split]], np.int64)
        return RawSplit(
            labels,
            lambda rows: [files[split][row] for row in rows],
            f'image folder "{path / split}"',
        )

    def opened(scratch: Path) -> RawTask:
        return RawTask(
            {SPLIT_NAMES[split]: raw_split(split) for split in files}, tuple(class_names)
        )

    return Source(
        path.resolve().name, opened, files=tuple(p for paths in files.values() for p in paths)
    )


def _read_parquet(files: Mapping[str, list[Path]], scratch: Path) -> "DatasetDict":
    """The tables by split, from a copy that `datasets` makes under `scratch`: what stays on disk is the pixels."""
    import pyarrow
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError

    paths = {split: [str(path) for path in some] for split, some in files.items()}
    try:
        with quiet():
            return load_dataset("parquet", data_files=paths, cache_dir=str(scratch))
    except (DatasetGenerationError, pyarrow.ArrowException, ValueError) as error:
        names = ", ".join(f'"{path}"' for some in files.values() for path in some)
        raise DeltaflError(
            f"{names} cannot be read: {error.__cause__ or error}. Is the download complete?"
        ) from error
