"""Published classification tasks by name, and the words that prompts use for their classes."""

import re
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from typing import Any

import yaml

from deltafl.errors import DeltaflError
from deltafl.recipes import Recipe


class NamedTask(Recipe):
    """One task of catalogue.yaml, where the names are.

    num_classes: K. templates: prompts with {} where the class goes. hub: the id on the Hugging Face
    hub; None: only a local folder will do. config: the hub set's configuration. image, label:
    columns, the first that the data have. class_names: K names for prompts; None: the data's own.
    labels: what the data call the K classes where that is something else, to recognise them by.
    test_is_validation: the split to test on is published as "validation".
    """

    num_classes: int
    templates: tuple[str, ...]
    hub: str | None = None
    config: str | None = None
    image: tuple[str, ...] = ("image", "img")
    label: tuple[str, ...] = ("label",)
    class_names: tuple[str, ...] | None = None
    labels: tuple[str, ...] | None = None
    test_is_validation: bool = False


@cache
def _file() -> dict[str, Any]:
    return yaml.safe_load((files("deltafl.tasks") / "catalogue.yaml").read_text(encoding="utf-8"))


@cache
def catalogue() -> Mapping[str, NamedTask]:
    """Name -> task."""
    return {name: NamedTask.model_validate(task) for name, task in _file()["tasks"].items()}


def are_numbers(names: Sequence[str]) -> bool:
    """Whether class names say no more than the labels: "0", "1", .."""
    return list(names) == [str(label) for label in range(len(names))]


def prompt_names(task: str, class_names: Sequence[str]) -> tuple[str, ...]:
    """One name for prompts for each class of the task called `task`, in the order of `class_names`.

    A class that the catalogue's task knows gets its name there, whatever the order; otherwise the
    data's own words are used, cleaned, so that no word is ever given to another class.

    Raises:
        DeltaflError: another number of classes than the catalogue's task, or numbers where words are
            needed.
    """
    named, words = catalogue().get(task), tuple(map(cleaned, class_names))
    if named is None:
        return words
    if len(words) != named.num_classes:
        raise DeltaflError(
            f'task "{task}" has {len(words)} classes, the one of that name in the catalogue '
            f"{named.num_classes}. Rename the folder, or give a head from a file."
        )
    known = named.class_names
    if are_numbers(class_names):
        if known is None:
            raise DeltaflError(
                f'task "{task}" has numbers for class names, and a zero-shot head needs words. '
                f"Put them in {task}_classes.json beside the Parquet files, a JSON list."
            )
        return known
    for names in (known, named.labels) if known else ():
        places = {_letters(name): place for place, name in enumerate(names or ())}
        if known and places.keys() == set(map(_letters, class_names)):
            return tuple(known[places[_letters(name)]] for name in class_names)
    return words


def prompt_templates(task: str) -> tuple[str, ...]:
    """The catalogue's templates for a task, or those for any task."""
    named = catalogue().get(task)
    return named.templates if named else tuple(_file()["templates"])


def cleaned(name: str) -> str:
    """A label as words: `/a/airport_terminal` and `AnnualCrop` lose what is not of a word.

    A leading slash with one letter is a folder of SUN397. Underscores and slashes become spaces; in
    a label without spaces a capital begins a new word.
    """
    name = re.sub(r"^/\w/", "", name)
    if " " not in name:
        name = re.sub(r"(?<=[a-z])(?=[A-Z][a-z])", " ", name)
    return " ".join(re.sub(r"[_/]", " ", name).split())


def _letters(name: str) -> str:
    return re.sub(r"[\W_]", "", name).casefold()
