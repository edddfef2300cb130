"""From what a user writes to where the images are: folders, tasks by name, the hub."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from deltafl.errors import DeltaflError, did_you_mean, shorten
from deltafl.tasks.cache import stamps
from deltafl.tasks.catalogue import NamedTask, catalogue
from deltafl.tasks.recipe import DataRecipe

if TYPE_CHECKING:
    from datasets import DatasetDict

SPLIT_NAMES = {"train": "train", "test": "test"}
SPLIT_NAMES |= dict.fromkeys(("validation", "valid", "val", "dev"), "val")
"""Names of splits in the wild -> ours."""

PARQUET_NAME = re.compile(
    rf"(?:(?P<prefix>.+)[-_.])?(?P<split>{'|'.join(SPLIT_NAMES)})(?:[-_.].*)?\.parquet"
)
"""`train.parquet`, `train-00000-of-00002.parquet`, `cifar100_train.parquet`: prefix (a set's name)
and split.
"""

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}


@dataclass(frozen=True)
class Found:
    """Image data that were found but not yet opened.

    `key` says which content they have, for the cache, so that a warm start never opens the source.
    `where` is the place of each split in errors, by its name there. Data are `files` by split,
    Parquet or images in folders of their classes, or `tables`. `sidecar`: a file with the names of
    classes. `named`: the catalogue's task.
    """

    name: str
    key: object
    where: Mapping[str, str]
    files: Mapping[str, Sequence[Path]] = field(default_factory=dict)
    tables: "DatasetDict | None" = None
    sidecar: Path | None = None
    named: NamedTask | None = None


def find(recipe: DataRecipe) -> Found | None:
    """The images that `recipe.data` names, None for digits; `DataRecipe` documents the syntax and
    what goes first.

    Raises:
        DeltaflError: nothing of that name, or settings that do not go with it.
    """
    spec, named = recipe.data, catalogue().get(recipe.data)
    kind, colon, target = spec.partition(":")
    is_path = bool(colon) and kind in ("parquet", "folder")
    path = Path(target if is_path else spec).expanduser()
    if kind == "lines" and colon:
        raise DeltaflError(f'data "{spec}" holds lines of text, and the model takes images')
    if recipe.data_dir is not None:
        if colon or "/" in spec or kind == "digits" or recipe.revision is not None:
            raise DeltaflError(
                f'data "{spec}": data_dir "{recipe.data_dir}" is for a task by its name '
                f"(cifar100), without a revision; {did_you_mean(spec, catalogue())}"
            )
        path = Path(recipe.data_dir).expanduser() / spec
        if named is None:
            return _local(path)
        # Perhaps a copy of the hub's repository, with the configuration's name within.
        inner = [path / sub for sub in (named.config, spec) if sub and (path / sub).is_dir()]
        return replace(_local((*inner, path)[0]), name=spec, named=named)
    if kind == "hub" and colon:
        return _on_hub(target, recipe.revision)
    if named and not path.exists():
        if named.hub is None:
            raise DeltaflError(
                f'task "{spec}" is on no hub under a known id. Download it and name the folder '
                "that holds it with --data-dir (data_dir)."
            )
        target = ":".join(filter(None, (named.hub, named.config)))
        return replace(_on_hub(target, recipe.revision), name=spec, named=named)
    if recipe.revision is not None:
        raise DeltaflError(f'data "{spec}": only a hub data set has a revision.')
    if is_path or (kind != "digits" and (path.exists() or "/" in spec)):
        return _local(path)
    if recipe.image_column or recipe.label_column:
        raise DeltaflError(f'data "{spec}": only Parquet files and hub data sets have columns.')
    if kind == "digits":
        return None
    raise DeltaflError(
        f'no data "{spec}": neither a folder here nor a task by name; '
        f"{did_you_mean(kind, {'digits', *catalogue()})}"
    )


def _on_hub(target: str, revision: str | None) -> Found:
    """`owner/name[:config]`, downloaded once into the cache of `datasets`."""
    from deltafl.tasks.tables import read_tables

    repo, _, config = target.partition(":")
    where = f"hub:{target}"
    tables = read_tables(repo, f'data "{where}"', name=config or None, revision=revision)
    return Found(
        target.split("/")[-1].replace(":", "_"),
        [table._fingerprint for table in tables.values()],
        {str(split): f'split "{split}" of {where}' for split in tables},
        tables=tables,
    )


def _local(path: Path) -> Found:
    """The images in folder `path`, or the set `path.name` among several in folder `path.parent`:
    Parquet files in the Hugging Face layout, or `train/CLASS/` and `test/CLASS/`.

    Raises:
        DeltaflError: there is no such folder or set, the folder holds several sets, or it holds
        none.
    """
    if not path.is_dir():
        sets = _parquet_sets(path.parent)
        if path.name in sets:
            return _parquet(path.name, sets[path.name])
        folders = {folder.name for folder in path.parent.glob("[!.]*") if folder.is_dir()}
        raise DeltaflError(
            f'there is no folder "{path}" and no Parquet file of that name; '
            f"{did_you_mean(path.name, folders | sets.keys())}"
        )
    sets = _parquet_sets(path) or _parquet_sets(path / "data")
    if len(sets) > 1:
        known = ", ".join(f'"{path / name}"' for name in sorted(sets))
        raise DeltaflError(f'folder "{path}" holds several data sets; name one of them: {known}.')
    for prefix, files in sets.items():
        return _parquet(prefix or path.resolve().name, files)
    return _image_folder(path)


def _parquet_sets(folder: Path) -> dict[str, dict[str, list[Path]]]:
    """Parquet files of a folder by set and split: {prefix or "": {split in the name: files}}."""
    sets: dict[str, dict[str, list[Path]]] = {}
    for path in sorted(folder.glob("*.parquet")):
        if match := PARQUET_NAME.fullmatch(path.name):
            sets.setdefault(match["prefix"] or "", {}).setdefault(match["split"], []).append(path)
    return sets


def _parquet(name: str, files: Mapping[str, list[Path]]) -> Found:
    every = [path for paths in files.values() for path in paths]
    sidecars = [every[0].with_name(file) for file in (f"{name}_classes.json", "classes.json")]
    sidecar = next((path for path in sidecars if path.is_file()), None)
    where = {split: shorten([*map(str, paths)], 1) for split, paths in files.items()}
    return Found(name, stamps([*every, *filter(None, [sidecar])]), where, files, sidecar=sidecar)


def _image_folder(path: Path) -> Found:
    found = {split: sorted(path.glob(f"{split}/*/*")) for split in SPLIT_NAMES}
    files = {
        split: [image for image in images if image.suffix.lower() in IMAGE_SUFFIXES]
        for split, images in found.items()
        if (path / split).is_dir()
    }
    every = [image for images in files.values() for image in images]
    if not every:
        raise DeltaflError(
            f'folder "{path}" holds neither Parquet files (train.parquet, test.parquet) nor images '
            "(train/CLASS/*.png, test/CLASS/*.png)."
        )
    where = {split: f'image folder "{path / split}"' for split in files}
    return Found(path.resolve().name, stamps(every), where, files)
