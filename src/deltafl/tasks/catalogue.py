"""Published tasks by name, and the words that prompts use for classes."""

import re
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from typing import TypeVar

import yaml
from pydantic import Field

from deltafl.errors import DeltaflError
from deltafl.recipes import Recipe
from deltafl.tasks.recipe import TextSource

T = TypeVar("T")

TEMPLATES = (
    "a photograph of a {}.",
    "an image showing a {}.",
    "this picture has a {} in it.",
    "one {}.",
)
"""Prompts for tasks that are not in the catalogue."""


class NamedTask(Recipe):
    """One task of catalogue.yaml, where the names are.

    num_classes: K. templates: prompts with {} where the class goes. hub: the id on the Hugging Face
    hub, `owner/name[:config]`; "": only a local folder will do. class_names: K
    names for prompts; None: the data's own. labels: what the data call the K classes where that is
    something else, to recognise them by. test_is_validation: the split to test on is published as
    "validation".
    """

    num_classes: int
    templates: tuple[str, ...]
    hub: str = ""
    class_names: tuple[str, ...] | None = None
    labels: tuple[str, ...] = ()
    test_is_validation: bool = False

    def of(
        self, name: str, splits: Mapping[str, T], names: Sequence[str]
    ) -> tuple[Mapping[str, T], Sequence[str]]:
        """Splits and class names of data as those of this task; where the data's names are numbers,
        the catalogue's.

        Raises:
            DeltaflError: another number of classes.
        """
        if self.test_is_validation and "test" not in splits and "val" in splits:
            splits = {"train": splits["train"], "test": splits["val"]}
        numbers = tuple(map(str, range(self.num_classes)))
        if tuple(names) == numbers[: len(names)]:
            names = self.class_names or numbers
        if len(names) != self.num_classes:
            raise DeltaflError(
                f'task "{name}" has {self.num_classes} classes, the labels of the data name '
                f"{len(names)}. Is it another data set? Name that one by its folder, folder:PATH."
            )
        return splits, names


class NamedText(TextSource):
    """One task of text_catalogue.yaml, where the names are.

    hub: as of a `NamedTask`. rows: split -> first and last row, from 0, of data without a test
    split.
    """

    hub: str
    rows: Mapping[str, list[int]] = Field({})


def _entries(file: str) -> dict[str, dict]:
    return yaml.safe_load((files("deltafl.tasks") / file).read_text(encoding="utf-8"))


@cache
def catalogue() -> Mapping[str, NamedTask]:
    """Name -> task of images."""
    return {n: NamedTask.model_validate(task) for n, task in _entries("catalogue.yaml").items()}


@cache
def text_catalogue() -> Mapping[str, NamedText]:
    """Name -> task of text."""
    return {
        n: NamedText.model_validate(task) for n, task in _entries("text_catalogue.yaml").items()
    }


def prompt_names(task: str, class_names: Sequence[str]) -> tuple[str, ...]:
    """One name for prompts for each class of the task called `task`, in the order of `class_names`.

    Classes that the catalogue's task knows get their names there, whatever the order; otherwise the
    data's own words are used, cleaned, so that no word is ever given to another class.

    Raises:
        DeltaflError: another number of classes than the catalogue's task, or numbers where words
            are needed.
    """
    named, words = catalogue().get(task), tuple(map(cleaned, class_names))
    if named is None:
        return words
    if len(words) != named.num_classes:
        raise DeltaflError(
            f'task "{task}" has {len(words)} classes, the one of that name in the catalogue '
            f"{named.num_classes}. Rename the folder, or give a head from a file."
        )
    numbers, names = tuple(map(str, range(len(words)))), named.class_names or ()
    if not names and words == numbers:
        raise DeltaflError(
            f'task "{task}" has numbers for class names, and a zero-shot head needs words. '
            f"Put them in {task}_classes.json beside the Parquet files, a JSON list."
        )
    for labels in (names, named.labels, numbers):
        known = dict(zip(map(_letters, labels), names, strict=False))
        if known.keys() == {*map(_letters, class_names)}:
            return tuple(known[_letters(name)] for name in class_names)
    return words


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
