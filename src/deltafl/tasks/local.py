"""Images in folders: Parquet files in the Hugging Face layout, or `train/CLASS/` and `test/CLASS/`."""

import json
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from pydantic import TypeAdapter

from deltafl.errors import DeltaflError, did_you_mean
from deltafl.tasks.cache import stamps
from deltafl.tasks.raw import SPLIT_NAMES, Columns, RawSplit, RawTask, Source, reader

PARQUET_NAME = re.compile(
    rf"(?:(?P<prefix>.+)[-_.])?(?P<split>{'|'.join(SPLIT_NAMES)})(?:[-_.].*)?\.parquet"
)
"""`train.parquet`, `train-00000-of-00002.parquet`, `cifar100_train.parquet`: prefix (a set's name)
and split.
"""

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}


def local_source(path: Path, columns: Columns) -> Source:
    """The images in folder `path`, or the set `path.name` among several in folder `path.parent`.

    Raises:
        DeltaflError: there is no such folder or set, the folder holds several sets, or it holds none.
    """
    if not path.is_dir():
        sets = _parquet_sets(path.parent)
        if path.name not in sets:
            folders = {folder.name for folder in path.parent.glob("[!.]*") if folder.is_dir()}
            raise DeltaflError(
                f'there is no folder "{path}" and no Parquet file of that name; '
                f"{did_you_mean(path.name, folders | sets.keys())}"
            )
        return _parquet(path.name, sets[path.name], columns)
    sets = _parquet_sets(path) or _parquet_sets(path / "data")
    if len(sets) > 1:
        known = ", ".join(f'"{path / name}"' for name in sorted(sets))
        raise DeltaflError(f'folder "{path}" holds several data sets; name one of them: {known}.')
    for prefix, files in sets.items():
        return _parquet(prefix or path.resolve().name, files, columns)
    return _image_folder(path)


def _parquet_sets(folder: Path) -> dict[str, dict[str, list[Path]]]:
    """The Parquet files of a folder by set and split: {prefix or "": {split in the name: files}}."""
    sets: dict[str, dict[str, list[Path]]] = {}
    for path in sorted(folder.glob("*.parquet")):
        if match := PARQUET_NAME.fullmatch(path.name):
            sets.setdefault(match["prefix"] or "", {}).setdefault(match["split"], []).append(path)
    return sets


def _parquet(name: str, files: Mapping[str, list[Path]], columns: Columns) -> Source:
    every = [path for paths in files.values() for path in paths]
    sidecars = [every[0].with_name(file) for file in (f"{name}_classes.json", "classes.json")]
    sidecars = [path for path in sidecars if path.is_file()][:1]

    def opened(scratch: Path) -> RawTask:
        """From a copy that `datasets` makes under `scratch`: what stays on disk is the pixels."""
        from deltafl.tasks.tables import raw_task, read_tables

        paths = {split: [str(path) for path in some] for split, some in files.items()}
        more = {
            s: f" and {len(some) - 1} more" if len(some) > 1 else "" for s, some in paths.items()
        }
        where = {split: f"{some[0]}{more[split]}" for split, some in paths.items()}
        tables = read_tables(
            "parquet", ", ".join(where.values()), data_files=paths, cache_dir=str(scratch)
        )
        return raw_task(tables, where, columns, _class_names(sidecars[0]) if sidecars else None)

    return Source(name, opened, repr((columns, stamps([*every, *sidecars]))))


def _class_names(sidecar: Path) -> list[str]:
    """A JSON list of names, or an object with such a list under "classes"."""
    try:
        names = json.loads(sidecar.read_text())
        return TypeAdapter(list[str]).validate_python(
            names["classes"] if isinstance(names, dict) else names
        )
    except (ValueError, KeyError) as error:
        raise DeltaflError(
            f'"{sidecar}" must hold a JSON list of class names, or an object with one under "classes".'
        ) from error


def _image_folder(path: Path) -> Source:
    """Listed here: `load_dataset("imagefolder")` takes 0.5 ms a file, five times a small image's
    decoding.
    """
    files = {
        split: sorted(p for p in path.glob(f"{split}/*/*") if p.suffix.lower() in IMAGE_SUFFIXES)
        for split in SPLIT_NAMES
        if (path / split).is_dir()
    }
    every = [image for images in files.values() for image in images]
    if not every:
        raise DeltaflError(
            f'folder "{path}" holds neither Parquet files (train.parquet, test.parquet) nor images '
            "(train/CLASS/*.png, test/CLASS/*.png)."
        )
    classes = sorted({image.parent.name for image in every})

    def raw_split(split: str) -> RawSplit:
        labels = [classes.index(image.parent.name) for image in files[split]]
        where = f'image folder "{path / split}"'
        return RawSplit(np.array(labels, np.int64), reader(files[split]), where)

    def opened(scratch: Path) -> RawTask:
        return RawTask({SPLIT_NAMES[split]: raw_split(split) for split in files}, tuple(classes))

    return Source(path.resolve().name, opened, repr(stamps(every)))
