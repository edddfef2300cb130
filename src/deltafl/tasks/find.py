"""From what a user writes to where the images are: folders, tasks by name, the hub."""

from dataclasses import replace
from pathlib import Path

from deltafl.errors import DeltaflError, did_you_mean
from deltafl.tasks.catalogue import NamedTask, are_numbers, catalogue
from deltafl.tasks.local import local_source, parquet_sets
from deltafl.tasks.raw import FAMILIES, Columns, RawTask, Source
from deltafl.tasks.recipe import DataRecipe


def find(recipe: DataRecipe) -> Source:
    """The images that `recipe.data` names; `DataRecipe` documents the syntax and what goes first.

    Raises:
        DeltaflError: nothing of that name, or settings that do not go with it.
    """
    spec, named = recipe.data, catalogue().get(recipe.data)
    kind, colon, target = spec.partition(":")
    columns = Columns(
        (recipe.image_column,) if recipe.image_column else named.image if named else ("image",),
        (recipe.label_column,) if recipe.label_column else named.label if named else ("label",),
    )
    if recipe.data_dir is not None:
        if colon or "/" in spec or kind in FAMILIES or recipe.revision is not None:
            raise DeltaflError(
                f'data "{spec}": data_dir "{recipe.data_dir}" is for a task by its name (cifar100), '
                f"without a revision; {did_you_mean(spec, catalogue())}"
            )
        folder = _within(Path(recipe.data_dir).expanduser(), spec, named)
        source = local_source(folder, columns)
        return _as_named(source, spec, named) if named else source
    if kind == "hub" and colon:
        return _hub_source(target, columns, recipe.revision)
    if named and not Path(spec).exists():
        return _named_on_hub(spec, named, columns, recipe.revision)
    if recipe.revision is not None:
        raise DeltaflError(f'data "{spec}": only a hub data set has a revision.')
    if kind in ("parquet", "folder") and colon:
        return local_source(Path(target).expanduser(), columns)
    path = Path(spec).expanduser()
    if kind not in FAMILIES and (path.exists() or "/" in spec):
        return local_source(path, columns)
    if recipe.image_column or recipe.label_column:
        raise DeltaflError(f'data "{spec}": only Parquet files and hub data sets have columns.')
    if kind in FAMILIES:
        return FAMILIES[kind](target)
    raise DeltaflError(
        f'no data "{spec}": neither a folder here, a registered family nor a task by name; '
        f"{did_you_mean(kind, {*FAMILIES, *catalogue()})}"
    )


def _hub_source(target: str, columns: Columns, revision: str | None) -> Source:
    """Image data of the hub; raises what `read_hub` does."""
    from deltafl.tasks.tables import raw_task, read_hub

    tables, content = read_hub(target, revision)
    places = {str(split): f'split "{split}" of hub:{target}' for split in tables}
    return Source(
        target.split("/")[-1].replace(":", "_"),
        lambda scratch: raw_task(tables, places, columns),
        fingerprint=f"{columns} {content}",
    )


def _named_on_hub(name: str, named: NamedTask, columns: Columns, revision: str | None) -> Source:
    if named.hub is None:
        raise DeltaflError(
            f'task "{name}" is on no hub under a known id. Download it and name the folder that '
            "holds it with --data-dir (data_dir)."
        )
    target = named.hub if named.config is None else f"{named.hub}:{named.config}"
    try:
        return _as_named(_hub_source(target, columns, revision), name, named)
    except DeltaflError as error:
        raise DeltaflError(
            f'task "{name}": {error} A folder of copies is named with --data-dir (data_dir).'
        ) from error


def _within(data_dir: Path, name: str, named: NamedTask | None) -> Path:
    """Where in `data_dir` a task is: a folder of its name, perhaps a copy of the hub's repository
    (with a folder of the configuration's name in it), or files with its name in front.
    """
    folder = data_dir / name
    if folder.is_dir():
        inner = (folder / sub for sub in (named and named.config, name) if sub)
        return next((path for path in inner if path.is_dir()), folder)
    sets = parquet_sets(data_dir)
    if data_dir.is_dir() and name not in sets:
        known = {*sets, *(path.name for path in data_dir.iterdir() if path.is_dir())} - {""}
        if named is None:
            raise DeltaflError(
                f'no task "{name}", neither in folder "{data_dir}" nor by name; '
                f"{did_you_mean(name, known | catalogue().keys())}"
            )
        raise DeltaflError(
            f'folder "{data_dir}" has no task "{name}": neither a folder {name} nor '
            f"{name}_train.parquet and {name}_test.parquet (it has: "
            f"{', '.join(sorted(known)) or 'none'})."
        )
    return folder


def _as_named(source: Source, name: str, named: NamedTask) -> Source:
    """The same data under the catalogue's name, their classes counted and, where they have no names,
    named.
    """

    def opened(scratch: Path) -> RawTask:
        raw = source.open(scratch)
        splits, names = dict(raw.splits), raw.class_names
        if named.test_is_validation and "test" not in splits and "val" in splits:
            splits["test"] = splits.pop("val")
        missing = named.num_classes - len(names)
        if missing < 0 or (missing > 0 and not are_numbers(names)):
            raise DeltaflError(
                f'task "{name}" has {named.num_classes} classes, the labels of the data name '
                f"{len(names)}. Is it another data set? Name that one by its folder, folder:PATH."
            )
        if are_numbers(names):
            names = named.class_names or tuple(map(str, range(named.num_classes)))
        return RawTask(splits, names)

    how = repr((named.num_classes, named.class_names, named.test_is_validation))
    return replace(source, name=name, open=opened, fingerprint=f"{source.fingerprint} {how}")
