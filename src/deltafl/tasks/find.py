"""From what a user writes to where the images are: folders, tasks by name, the hub."""

from pathlib import Path

from deltafl.errors import DeltaflError, did_you_mean
from deltafl.tasks.catalogue import NamedTask, are_numbers, catalogue
from deltafl.tasks.local import local_source
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
    is_path = bool(colon) and kind in ("parquet", "folder")
    path = Path(target if is_path else spec).expanduser()
    if kind == "lines" and colon:
        raise DeltaflError(f'data "{spec}" holds lines of text, and the model takes images')
    if recipe.data_dir is not None:
        if colon or "/" in spec or kind in FAMILIES or recipe.revision is not None:
            raise DeltaflError(
                f'data "{spec}": data_dir "{recipe.data_dir}" is for a task by its name (cifar100), '
                f"without a revision; {did_you_mean(spec, catalogue())}"
            )
        folder = Path(recipe.data_dir).expanduser() / spec
        if named is None:
            return local_source(folder, columns)
        # Perhaps a copy of the hub's repository, with the configuration's name within.
        inner = [folder / sub for sub in (named.config, spec) if sub and (folder / sub).is_dir()]
        return _as_named(local_source((*inner, folder)[0], columns), spec, named)
    if kind == "hub" and colon:
        return _on_hub(target, columns, recipe.revision)
    if named and not path.exists():
        if named.hub is None:
            raise DeltaflError(
                f'task "{spec}" is on no hub under a known id. Download it and name the folder that '
                "holds it with --data-dir (data_dir)."
            )
        target = f"{named.hub}:{named.config}" if named.config else named.hub
        return _as_named(_on_hub(target, columns, recipe.revision), spec, named)
    if recipe.revision is not None:
        raise DeltaflError(f'data "{spec}": only a hub data set has a revision.')
    if is_path or (kind not in FAMILIES and (path.exists() or "/" in spec)):
        return local_source(path, columns)
    if recipe.image_column or recipe.label_column:
        raise DeltaflError(f'data "{spec}": only Parquet files and hub data sets have columns.')
    if kind in FAMILIES:
        return FAMILIES[kind](target)
    raise DeltaflError(
        f'no data "{spec}": neither a folder here, a registered family nor a task by name; '
        f"{did_you_mean(kind, {*FAMILIES, *catalogue()})}"
    )


def _on_hub(target: str, columns: Columns, revision: str | None) -> Source:
    """`owner/name[:config]`, downloaded once into the cache of `datasets`."""
    from deltafl.tasks.tables import raw_task, read_tables

    repo, _, config = target.partition(":")
    where = f"hub:{target}"
    tables = read_tables(repo, f'data "{where}"', name=config or None, revision=revision)
    places = {str(split): f'split "{split}" of {where}' for split in tables}
    return Source(
        target.split("/")[-1].replace(":", "_"),
        lambda scratch: raw_task(tables, places, columns),
        repr((columns, [table._fingerprint for table in tables.values()])),
    )


def _as_named(source: Source, name: str, named: NamedTask) -> Source:
    """The same data under the catalogue's name, their classes counted and, where they have no names,
    named.
    """

    def opened(scratch: Path) -> RawTask:
        raw = source.open(scratch)
        splits, names = dict(raw.splits), raw.class_names
        if named.test_is_validation and "test" not in splits and "val" in splits:
            splits["test"] = splits.pop("val")
        if are_numbers(names) and len(names) <= named.num_classes:
            names = named.class_names or tuple(map(str, range(named.num_classes)))
        if len(names) != named.num_classes:
            raise DeltaflError(
                f'task "{name}" has {named.num_classes} classes, the labels of the data name '
                f"{len(names)}. Is it another data set? Name that one by its folder, folder:PATH."
            )
        return RawTask(splits, names)

    return Source(name, opened, f"{source.key} {named!r}")
