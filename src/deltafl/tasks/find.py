"""From what a user writes to where the data are: files, folders, tasks by name, the hub."""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from deltafl.errors import DeltaflError, did_you_mean
from deltafl.tasks.cache import stamps
from deltafl.tasks.catalogue import NamedTask, NamedText, catalogue, text_catalogue
from deltafl.tasks.recipe import DataRecipe

if TYPE_CHECKING:
    from datasets import DatasetDict

SPLIT_NAMES = {"train": "train", "test": "test"}
SPLIT_NAMES |= dict.fromkeys(("validation", "valid", "val", "dev"), "val")
"""Names of splits in the wild -> ours."""

TABLE_NAME = re.compile(
    rf"(?:(?P<prefix>.+)[-_.])?(?P<split>{'|'.join(SPLIT_NAMES)})(?:[-_.].*)?\.[a-z]+"
)
"""`train.parquet`, `train-00000-of-00002.parquet`, `cifar100_train.parquet`: prefix (a set's name)
and split.
"""

TEXT_SUFFIXES = {".jsonl", ".json", ".parquet"}

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}


@dataclass(frozen=True)
class Found:
    """Data that were found but not yet opened: `files` by split, tables or images in folders of
    their classes, or `tables`.

    `where` is their place in errors. `sidecar`: a file with the names of classes. `named`: the
    catalogue's task.
    """

    name: str
    where: str
    files: Mapping[str, Sequence[Path]] = field(default_factory=dict)
    tables: "DatasetDict | None" = None
    sidecar: Path | None = None
    named: NamedTask | NamedText | None = None

    @property
    def key(self) -> object:
        """Which content they have, for the cache: a warm start never opens the source."""
        if self.tables:
            return [table._fingerprint for table in self.tables.values()]
        return stamps([*chain(*self.files.values()), *filter(None, [self.sidecar])])


def find(recipe: DataRecipe, *, text: bool = False) -> Found | None:
    """The images, or the text, that `recipe.data` names, None for digits; `DataRecipe` documents
    the syntax and what goes first.

    Raises:
        DeltaflError: nothing of that name, or settings that do not go with it.
    """
    spec = recipe.data
    known, others = (text_catalogue(), catalogue()) if text else (catalogue(), text_catalogue())
    named, (holds, takes) = known.get(spec), ("images", "text")[:: 1 if text else -1]
    kind, colon, target = spec.partition(":")
    is_path = bool(colon) and kind in ("parquet", "folder")
    path = Path(target if is_path else spec).expanduser()
    other = spec in others or (kind == "digits" if text else kind == "lines" and colon)
    if other and not path.exists():
        raise DeltaflError(f'data "{spec}" holds {holds}, and the model takes {takes}')
    if recipe.data_dir is not None:
        if colon or "/" in spec or kind == "digits" or recipe.revision is not None:
            raise DeltaflError(
                f'data "{spec}": data_dir "{recipe.data_dir}" is for a task by its name '
                f"({next(iter(known))}), without a revision; {did_you_mean(spec, known)}"
            )
        path = Path(recipe.data_dir).expanduser() / spec
        # Perhaps a copy of the hub's repository, with the configuration's name within.
        config = named.hub.partition(":")[2] if named else ""
        place = next(filter(Path.is_dir, (path / (config or spec), path / spec)), path)
        return replace(_local(place, text), name=spec, named=named)
    if kind == "hub" and colon:
        return _on_hub(target, recipe.revision)
    if named and not path.exists():
        if not named.hub:
            raise DeltaflError(
                f'task "{spec}" is on no hub under a known id. Download it and name the folder '
                "that holds it with --data-dir (data_dir)."
            )
        return replace(_on_hub(named.hub, recipe.revision), name=spec, named=named)
    if recipe.revision is not None:
        raise DeltaflError(f'data "{spec}": only a hub data set has a revision.')
    if is_path or (kind != "digits" and (path.exists() or "/" in spec)):
        return _local(path, text)
    if recipe.image_column or recipe.label_column:
        raise DeltaflError(f'data "{spec}": only Parquet files and hub data sets have columns.')
    if kind == "digits":
        return None
    raise DeltaflError(
        f'no data "{spec}": neither a folder here nor a task by name; '
        f"{did_you_mean(kind, known if text else {'digits', *known})}"
    )


def _on_hub(target: str, revision: str | None) -> Found:
    """`owner/name[:config]`, downloaded once into the cache of `datasets`."""
    from deltafl.tasks.tables import read_tables

    repo, _, config = target.partition(":")
    where = f'data "hub:{target}"'
    tables = read_tables(repo, where, name=config or None, revision=revision)
    return Found(target.split("/")[-1].replace(":", "_"), where, tables=tables)


def _local(path: Path, text: bool) -> Found:
    """The data in folder `path`, or the set `path.name` among several in folder `path.parent`:
    Parquet files in the Hugging Face layout, for text JSON too, or `train/CLASS/` and
    `test/CLASS/`; of text also the one file `path`.

    Raises:
        DeltaflError: there is no such folder or set, or the folder holds several sets.
    """
    suffixes = TEXT_SUFFIXES if text else {".parquet"}
    if text and path.is_file() and path.suffix in suffixes:
        return Found(path.stem, f'"{path}"', {"train": [path]})
    sets = _sets(path, suffixes) or _sets(path / "data", suffixes)
    if not text:
        sets = sets or _images(path)
        if not sets and _sets(path, TEXT_SUFFIXES):
            raise DeltaflError(f'folder "{path}" holds text, and the model takes images')
    beside = _sets(path.parent, suffixes)
    if not sets and path.name in beside:
        sets = {path.name: beside[path.name]}
    if len(sets) > 1:
        known = ", ".join(f'"{path / name}"' for name in sorted(sets))
        raise DeltaflError(f'folder "{path}" holds several data sets; name one of them: {known}.')
    for prefix, files in sets.items():
        name, first = prefix or path.resolve().name, next(chain(*files.values()))
        sidecars = [first.with_name(file) for file in (f"{name}_classes.json", "classes.json")]
        sidecar = next(filter(Path.is_file, sidecars), None)
        return Found(name, f'"{path}"', files, sidecar=sidecar)
    folders = {folder.name for folder in path.parent.glob("[!.]*") if folder.is_dir()}
    wanted = (
        "text (train.jsonl, test.jsonl, also .json and .parquet, or lines in train*.txt, test*.txt)"
        if text
        else "Parquet files (train.parquet, test.parquet) or images (train/CLASS/*.png, "
        "test/CLASS/*.png)"
    )
    raise DeltaflError(
        f'there is no folder "{path}" with {wanted}, and no file of that name; '
        f"{did_you_mean(path.name, folders | beside.keys())}"
    )


def _sets(folder: Path, suffixes: Collection[str]) -> dict[str, dict[str, list[Path]]]:
    """Tables of a folder by set and split: {prefix or "": {split in the name: files}}; one of text
    without a split is a set of its own, all "train".
    """
    sets: dict[str, dict[str, list[Path]]] = {}
    for path in sorted(p for p in folder.glob("*") if p.suffix in suffixes):
        match = TABLE_NAME.fullmatch(path.name)
        if match or ".json" in suffixes:
            name, split = (match["prefix"], match["split"]) if match else (path.stem, "train")
            sets.setdefault(name or "", {}).setdefault(split, []).append(path)
    return sets


def _images(path: Path) -> dict[str, dict[str, list[Path]]]:
    """Images of a folder as a set, in the same form."""
    files = {
        split: [p for p in sorted(path.glob(f"{split}/*/*")) if p.suffix.lower() in IMAGE_SUFFIXES]
        for split in SPLIT_NAMES
        if (path / split).is_dir()
    }
    return {"": files} if any(files.values()) else {}
