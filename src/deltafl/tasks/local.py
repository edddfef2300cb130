"""Data in folders: Parquet files in the Hugging Face layout, images in `train/CLASS/` and
`test/CLASS/`, or lines of text.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from deltafl.errors import DeltaflError, did_you_mean
from deltafl.tasks.raw import SPLIT_NAMES, Columns, RawSplit, RawTask, Source

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
    if path.is_dir():
        sets = parquet_sets(path) or parquet_sets(path / "data")
        if len(sets) > 1:
            known = ", ".join(f'"{path / name}"' for name in sorted(sets))
            raise DeltaflError(
                f'folder "{path}" holds several data sets; name one of them: {known}.'
            )
        for prefix, files in sets.items():
            return _parquet_source(prefix or path.resolve().name, files, columns)
        return _image_folder(path)
    sets = parquet_sets(path.parent)
    if path.name in sets:
        return _parquet_source(path.name, sets[path.name], columns)
    if sets:
        raise DeltaflError(
            f'folder "{path.parent}" has no data set "{path.name}"; {did_you_mean(path.name, sets)}'
        )
    raise DeltaflError(
        f'there is no folder "{path}", and no Parquet file of that name. Check the path.'
    )


def parquet_sets(folder: Path) -> dict[str, dict[str, list[Path]]]:
    """The Parquet files of a folder by set and split: {prefix or "": {split in the name: files}}."""
    sets: dict[str, dict[str, list[Path]]] = {}
    for path in sorted(folder.glob("*.parquet")):
        if match := PARQUET_NAME.fullmatch(path.name):
            sets.setdefault(match["prefix"] or "", {}).setdefault(match["split"], []).append(path)
    return sets


def _parquet_source(name: str, files: Mapping[str, list[Path]], columns: Columns) -> Source:
    every = [path for paths in files.values() for path in paths]
    sidecars = [every[0].with_name(file) for file in (f"{name}_classes.json", "classes.json")]
    sidecars = [path for path in sidecars if path.is_file()][:1]
    places = {
        split: str(paths[0]) + (f" and {len(paths) - 1} more" if len(paths) > 1 else "")
        for split, paths in files.items()
    }

    def opened(scratch: Path) -> RawTask:
        from deltafl.tasks.tables import raw_task, read_parquet

        names = _class_names(sidecars[0]) if sidecars else None
        return raw_task(read_parquet(files, scratch), places, columns, names)

    return Source(name, opened, (*every, *sidecars), fingerprint=repr(columns))


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


def _image_folder(path: Path) -> Source:
    """Listed here: `load_dataset("imagefolder")` takes 0.5 ms a file, five times a small image's
    decoding.
    """
    files = {
        folder.name: sorted(p for p in folder.glob("*/*") if p.suffix.lower() in IMAGE_SUFFIXES)
        for folder in sorted(path.iterdir())
        if folder.name in SPLIT_NAMES and folder.is_dir()
    }
    every = [p for paths in files.values() for p in paths]
    if not every:
        raise DeltaflError(
            f'folder "{path}" holds neither Parquet files (train.parquet, test.parquet), images '
            "(train/CLASS/*.png, test/CLASS/*.png) nor text (train.txt, test.txt)."
        )
    class_names = sorted({p.parent.name for p in every})

    def raw_split(split: str) -> RawSplit:
        labels = np.array([class_names.index(p.parent.name) for p in files[split]], np.int64)
        where = f'image folder "{path / split}"'
        return RawSplit(labels, lambda rows: [files[split][row] for row in rows], where)

    def opened(scratch: Path) -> RawTask:
        return RawTask({SPLIT_NAMES[s]: raw_split(s) for s in files}, tuple(class_names))

    return Source(path.resolve().name, opened, files=tuple(every))
