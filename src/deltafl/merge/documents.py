"""The documents of a recipe file: each but the last makes a model that later ones name."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from deltafl.checkpoints.layout import split_ref
from deltafl.errors import DeltaflError, attempt
from deltafl.merge.mergekit_file import Mergekit, model_named
from deltafl.recipes import read_recipe

Document: TypeAlias = Mapping[str, Any]

NOT_MODELS = ("name", "method", "merge_method")
"""Keys whose values are never names of models."""


def documents_of(found: Sequence[Document]) -> list[Document]:
    """The documents of a file, each after those that it names. Of mergekit's, an adapter that is a
    base, or on another model than the base, becomes a model by a document of its own.

    Raises:
        DeltaflError: names that are missing or given twice, or that go round in a circle; keys of
            mergekit's that are wrong.
    """
    problems = list[str]()
    for one in found:
        if "merge_method" in one:
            attempt(problems, read_recipe, Mergekit, one)
    if problems:
        raise DeltaflError(*problems)
    names = [one.get("name", "") for one in found]
    if len(found) > 1 and (names.count("") > 1 or len({*names}) < len(names)):
        raise DeltaflError("several documents: give each but one a name of its own")
    left, done = sorted(found, key=lambda one: not one.get("name")), list[Document]()
    while left:
        waiting = {one.get("name") for one in left} - {None}
        ready = next((one for one in left if not _names(one) & waiting), None)
        if ready is None:
            circle = ", ".join(one["name"] for one in left)
            raise DeltaflError(f"several documents: they name one another in a circle: {circle}")
        left.remove(ready)
        made = {one.get("name") for one in done}
        done += [adapted(ref) for ref in _adapters(ready) if ref not in made]
        done.append(ready)
    return done


def resolved(data: Any, made: Mapping[str, Path]) -> Any:
    """The same with folders in place of the names of models that were made."""
    if isinstance(data, dict):
        return {k: v if k in NOT_MODELS else resolved(v, made) for k, v in data.items()}
    if isinstance(data, list | tuple):
        return [resolved(value, made) for value in data]
    if not isinstance(data, str) or data in made:
        return str(made[data]) if isinstance(data, str) else data
    own, plus, adapter = data.partition("+")
    return f"{made.get(own, own)}{plus}{adapter}"


def adapted(ref: str) -> Document:
    """What makes a model of `BASE+ADAPTER`."""
    models = ({"model": ref, "parameters": {"weight": 1.0}},)
    base = split_ref(ref)[0]
    return {"name": ref, "merge_method": "task_arithmetic", "base_model": base, "models": models}


def _names(data: object) -> set[str]:
    if isinstance(data, dict):
        return set().union(*(_names(data[key]) for key in data if key not in NOT_MODELS))
    if isinstance(data, list | tuple):
        return set().union(*map(_names, data))
    return set(data.split("+")) if isinstance(data, str) else set()


def _adapters(document: Document) -> list[str]:
    """Those of a mergekit document that cannot stay what they are."""
    if "merge_method" not in document:
        return []
    own = model_named(document.get("base_model")) or ""
    found = dict.fromkeys(ref for ref in _models(document) if split_ref(ref)[0])
    return [ref for ref in found if ref == own or split_ref(ref)[0] != own]


def _models(data: object) -> Iterator[str]:
    if isinstance(data, dict):
        for key, value in data.items():
            if key in ("model", "base_model") and (ref := model_named(value)):
                yield ref
            else:
                yield from _models(value)
    elif isinstance(data, list | tuple):
        for value in data:
            yield from _models(value)
