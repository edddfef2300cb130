"""Tasks of the catalogue as sources, and the words that a zero-shot head uses for their classes."""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from deltafl.errors import DeltaflError, did_you_mean
from deltafl.tasks.catalogue import CATALOGUE, GENERIC_TEMPLATES, NamedTask
from deltafl.tasks.hub import hub_source
from deltafl.tasks.huggingface import Columns
from deltafl.tasks.local import local_source, parquet_sets
from deltafl.tasks.source import RawTask, Source


def named_source(
    name: str,
    data_dir: Path | None = None,
    image_column: Columns | None = None,
    label_column: Columns | None = None,
    revision: str | None = None,
) -> Source:
    """The task `name` from the hub, or from `data_dir`: a folder `name` in it, or its files `name_*.parquet`.

    A folder may be a copy of the hub's repository (`data/`, or a folder with the configuration's name, within it).
    In `data_dir` a set that the catalogue does not know is found by its name too.

    Raises:
        DeltaflError: no such name, no such folder, a task that the hub does not hold, no network.
    """
    named = CATALOGUE.get(name)
    image = image_column or (named.image if named else "image")
    label = label_column or (named.label if named else "label")
    if data_dir is not None:
        source = local_source(_within(data_dir, name, named), image, label)
        return source if named is None else _as_named(source, name, named)
    if named is None:
        raise DeltaflError(f'no task "{name}"; {did_you_mean(name, CATALOGUE)}')
    if named.hub is None:
        raise DeltaflError(
            f'task "{name}" is on no hub under a known id. Download it and name the folder that holds it with '
            "--data-dir (data_dir)."
        )
    target = named.hub if named.config is None else f"{named.hub}:{named.config}"
    try:
        return _as_named(hub_source(target, image, label, revision), name, named)
    except DeltaflError as error:
        raise DeltaflError(
            f'task "{name}": {error} A folder of copies is named with --data-dir (data_dir).'
        ) from error


def _within(data_dir: Path, name: str, named: NamedTask | None) -> Path:
    own = data_dir / name
    if own.is_dir():
        inner = (own / sub for sub in (named and named.config, name) if sub)
        return next((path for path in inner if path.is_dir()), own)
    sets = parquet_sets(data_dir)
    if data_dir.is_dir() and name not in sets:
        known = {*sets, *(path.name for path in data_dir.iterdir() if path.is_dir())} - {""}
        if named is None:
            raise DeltaflError(
                f'no task "{name}", neither in folder "{data_dir}" nor by name; '
                f"{did_you_mean(name, known | CATALOGUE.keys())}"
            )
        raise DeltaflError(
            f'folder "{data_dir}" has no task "{name}": neither a folder {name} nor {name}_train.parquet '
            f"and {name}_test.parquet (it has: {', '.join(sorted(known)) or 'none'})."
        )
    return own


def _as_named(source: Source, name: str, named: NamedTask) -> Source:
    """The same data under the catalogue's name, their classes counted and, where they have no names, named."""

    def opened(scratch: Path) -> RawTask:
        raw = source.open(scratch)
        splits = dict(raw.splits)
        if named.test_is_validation and "test" not in splits and "val" in splits:
            splits["test"] = splits.pop("val")
        return RawTask(splits, _class_names(raw.class_names, name, named))

    how = repr((named.num_classes, named.class_names, named.test_is_validation))
    return replace(source, name=name, open=opened, fingerprint=f"{source.fingerprint} {how}")


def _class_names(own: tuple[str, ...], name: str, named: NamedTask) -> tuple[str, ...]:
    """The data's own names; where those are mere numbers, the catalogue's."""
    numbers = _numbers(own)
    if len(own) > named.num_classes or (len(own) < named.num_classes and not numbers):
        raise DeltaflError(
            f'task "{name}" has {named.num_classes} classes, the labels of the data name {len(own)}. '
            "Is it another data set? Name that one by its folder, folder:PATH."
        )
    if numbers:
        return named.class_names or tuple(str(label) for label in range(named.num_classes))
    return own


def _numbers(names: Sequence[str]) -> bool:
    return list(names) == [str(label) for label in range(len(names))]


def prompt_names(task: str, class_names: Sequence[str]) -> tuple[str, ...]:
    """One name for prompts for each class of the task called `task`, in the order of `class_names`.

    A class that the catalogue's task knows gets its name there, whatever the order; otherwise the data's own words
    are used, cleaned, so that no word is ever given to another class.

    Raises:
        DeltaflError: another number of classes than the catalogue's task, or numbers where words are needed.
    """
    named, own = CATALOGUE.get(task), tuple(cleaned(name) for name in class_names)
    if named is None:
        return own
    if len(own) != named.num_classes:
        raise DeltaflError(
            f'task "{task}" has {len(own)} classes, the one of that name in the catalogue {named.num_classes}. '
            "Rename the folder, or give a head from a file."
        )
    if named.class_names is None:
        if _numbers(class_names):
            raise DeltaflError(
                f'task "{task}" has numbers for class names, and a zero-shot head needs words. '
                f"Put them in {task}_classes.json beside the Parquet files, a JSON list."
            )
        return own
    if _numbers(class_names):
        return named.class_names
    for known in (named.class_names, named.labels or ()):
        places = {_key(word): place for place, word in enumerate(known)}
        if sorted(places) == sorted(_key(name) for name in class_names):
            return tuple(named.class_names[places[_key(name)]] for name in class_names)
    return own


def prompt_templates(task: str) -> tuple[str, ...]:
    """The catalogue's templates for a task, or those for any task."""
    return CATALOGUE[task].templates if task in CATALOGUE else GENERIC_TEMPLATES


def cleaned(name: str) -> str:
    """A label as words: `/a/airport_terminal`, `AnnualCrop` and `bow_window/indoor` lose what is not of a word.

    A leading slash with one letter is a folder of SUN397. Underscores and slashes become spaces; in a label without
    spaces a capital begins a new word.
    """
    name = re.sub(r"^/\w/", "", name)
    if " " not in name:
        name = re.sub(r"(?<=[a-z])(?=[A-Z][a-z])", " ", name)
    return " ".join(re.sub(r"[_/]", " ", name).split())


def _key(name: str) -> str:
    return re.sub(r"[\W_]", "", name).casefold()
