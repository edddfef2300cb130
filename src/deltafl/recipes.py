"""Recipes: one class per command, the only place where its settings are written.

The fields of a `Recipe`, with their types, ranges and descriptions, are the keys of its YAML file,
the options of its command, `--help`, the errors, the page of the documentation and the JSON schema.
A field that is a Recipe itself is a section: `sparse: {sparsity_ratio: 0.9}` in the file,
`--sparsity-ratio 0.9` on the command line.
"""

import difflib
import functools
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self, TypeAlias, TypeVar, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    GetJsonSchemaHandler,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic_core import CoreSchema, ErrorDetails, PydanticCustomError

from deltafl.errors import DeltaflError, brief, did_you_mean
from deltafl.recipe_file import load_yaml

R = TypeVar("R", bound="Recipe")
Settings: TypeAlias = Mapping[str, object]
Keys: TypeAlias = tuple[str, ...]
"""The keys that lead to a value."""


class Recipe(BaseModel):
    """The settings of a command, or a section of them: frozen, no unknown keys, no conversion.

    Annotate sequences as tuples; a list of the file becomes one. Of leaves (what is no section)
    that share a name the outermost is meant where it stands without its section.

    renamed: path of an old key -> path of the new one, or a sentence that says why there is none.
    alternatives: groups of leaves that say one thing; an option replaces its whole group in a file.
    defaults: of fields that are those of the parent class but for their default.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)
    renamed: ClassVar[Mapping[str, str]] = {}
    alternatives: ClassVar[Sequence[Collection[str]]] = ()
    defaults: ClassVar[Settings] = {}

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: object) -> None:
        """Set the defaults."""
        for name, value in cls.defaults.items():
            cls.model_fields[name].default = value
        if cls.defaults:
            cls.model_rebuild(force=True)

    @classmethod
    def of(cls, **settings: object) -> Self:
        """The recipe with these leaves, and defaults for the others. Raises DeltaflError."""
        return read_recipe(cls, settings=settings)

    def replace(self, **settings: object) -> Self:
        """The same recipe with other values of some leaves, checked. Raises DeltaflError."""
        return read_recipe(type(self), self.resolved(), settings)

    def problems(self) -> Iterable[str]:
        """What values that are good one by one cannot do together, one line each."""
        return ()

    def resolved(self) -> dict[str, Any]:
        """All settings as plain values, as a file would give them."""
        return self.model_dump(mode="json", by_alias=True)

    def content(self) -> dict[str, Any]:
        """The settings that decide numbers: all but the incidental ones."""
        data = self.resolved()
        for leaf in leaves(type(self)).values():
            if Incidental in leaf.field.metadata:
                _place(data, leaf.path).pop(leaf.name)
        return data

    @field_validator("*", mode="before")
    @classmethod
    def _as_tuple(cls, value: object) -> object:
        return tuple(map(cls._as_tuple, value)) if isinstance(value, list) else value

    @model_validator(mode="after")
    def _check(self) -> Self:
        if found := list(self.problems()):
            raise problem(*found)
        return self

    @classmethod
    def __get_pydantic_json_schema__(
        cls, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        """As pydantic's, with the short form of sections."""
        found = handler.resolve_ref_schema(handler(schema))
        for name, field in cls.model_fields.items():
            if (inner := section(field)) and name in inner.model_fields:
                kinds = [found["properties"][name], {"type": "string"}]
                found["properties"][name] = {"anyOf": kinds}
        return found


class Incidental:
    """Marks a setting that decides no number: `out: Annotated[str, Incidental]`."""


@dataclass(frozen=True)
class Flags:
    """Marks a setting whose options are not named as it is; without names it has none."""

    names: tuple[str, ...] = ()


def one_of(names: Callable[[], Iterable[str]]) -> AfterValidator:
    """Marks a string that must be one of the names that a registry holds."""

    def check(value: str) -> str:
        if value not in (known := list(names())):
            raise problem(f'unknown "{value}"; {did_you_mean(value, known)}')
        return value

    return AfterValidator(check)


def problem(*lines: str) -> PydanticCustomError:
    """What a validator raises to say in its own words what is wrong; the key's path goes before
    each line.
    """
    return PydanticCustomError("recipe", "{text}", {"text": "\n".join(lines)})


@dataclass(frozen=True)
class Leaf:
    """A setting and the keys that lead to it; name: the last of them."""

    name: str
    path: Keys
    field: FieldInfo

    @property
    def flags(self) -> tuple[str, ...]:
        """Its options, `--num-clients`, unless its type cannot be one."""
        named = (f"--{self.name.replace('_', '-')}",)
        return next((m.names for m in self.field.metadata if isinstance(m, Flags)), named)


def leaves(kind: type[Recipe]) -> dict[str, Leaf]:
    """Name -> leaf of a recipe and its sections, the outermost of those that share a name."""
    found: dict[str, Leaf] = {}
    for leaf in sorted(all_leaves(kind), key=lambda leaf: len(leaf.path)):
        found.setdefault(leaf.name, leaf)
    return found


def all_leaves(kind: type[Recipe], path: Keys = ()) -> Iterator[Leaf]:
    """Every leaf of a recipe and its sections."""
    for name, field in kind.model_fields.items():
        key = field.alias or name
        if inner := section(field):
            yield from all_leaves(inner, (*path, key))
        else:
            yield Leaf(key, (*path, key), field)


def every_leaf(kind: type[Recipe]) -> Iterator[Leaf]:
    """Every leaf, also of the mappings in lists, by a path like models[].path."""
    for leaf in all_leaves(kind):
        yield leaf
        for entry in recipes_in(leaf.field.annotation):
            for inner in every_leaf(entry):
                path = (*leaf.path[:-1], f"{leaf.name}[]", *inner.path)
                yield Leaf(inner.name, path, inner.field)


def section(field: FieldInfo) -> type[Recipe] | None:
    """The recipe that a field holds, if it is a section."""
    kind = field.annotation
    return kind if isinstance(kind, type) and issubclass(kind, Recipe) else None


def recipes_in(annotation: object) -> list[type[Recipe]]:
    """The recipes in a type, such as that of the mappings in a list."""
    if isinstance(annotation, type) and issubclass(annotation, Recipe):
        return [annotation]
    return [kind for part in get_args(annotation) for kind in recipes_in(part)]


def read_recipe(
    kind: type[R],
    file: str | Path | Settings | None = None,
    settings: Settings | None = None,
    *,
    defaults: Settings | None = None,
) -> R:
    """The recipe of a file, or its content, with leaves in `settings` over it and leaves in
    `defaults` under it.

    Raises:
        DeltaflError: one line for each mistake, with the path of the key.
    """
    data, found = load_yaml(file) if isinstance(file, str | Path) else file or {}, list[str]()
    values: dict[Keys, object] = {}
    for layer, anywhere in ((defaults or {}, True), (data, False), (settings or {}, True)):
        above = _by_path(kind, layer, found, anywhere)
        named = {path[-1] for path in above}
        replaced = {name for group in kind.alternatives if named & {*group} for name in group}
        values = {path: v for path, v in values.items() if path[-1] not in replaced} | above
    nested: dict[str, Any] = {}
    for leaf in all_leaves(kind):
        _place(nested, leaf.path)
    for path, value in sorted(values.items(), key=lambda item: -len(item[0])):
        _place(nested, path)[path[-1]] = value
    try:
        recipe = kind.model_validate(nested)
    except ValidationError as error:
        found += _mistakes(kind, nested, error.errors())
    else:
        if not found:
            return recipe
    raise DeltaflError(*found)


def _place(tree: dict[str, Any], path: Keys) -> dict[str, Any]:
    """The mapping that holds the last key of a path."""
    return functools.reduce(lambda place, key: place.setdefault(key, {}), path[:-1], tree)


def _by_path(
    kind: type[Recipe], data: Settings, found: list[str], anywhere: bool
) -> dict[Keys, object]:
    """Path of a leaf -> value, of nested mappings; `found` gets a line for each key that is gone,
    or not where it belongs unless it may stand anywhere.
    """
    known, paths = leaves(kind), {leaf.path for leaf in all_leaves(kind)}
    values: dict[Keys, object] = {}
    for path, value in _walk(kind, data):
        key, leaf = ".".join(path), known.get(path[-1])
        new = kind.renamed.get(key, "")
        if leaf and not new and path not in paths:
            new = ".".join(leaf.path)
        if " " in new:
            found.append(f'"{key}": {new}')
            continue
        if new and not anywhere:
            found.append(f'"{key}" is now "{new}"')
        values.setdefault(tuple(new.split(".")) if new else path, value)
    return values


def _walk(kind: type[Recipe], data: Settings, path: Keys = ()) -> Iterator[tuple[Keys, object]]:
    """The keys that lead to each value, through sections; `head: ridge` is short for `head: {head:
    ridge}`.
    """
    for key, value in data.items():
        inner = section(kind.model_fields[key]) if key in kind.model_fields else None
        value = value.resolved() if isinstance(value, Recipe) else value
        if inner and key in inner.model_fields and not isinstance(value, Mapping):
            value = {key: value}
        if inner and isinstance(value, Mapping):
            yield from _walk(inner, value, (*path, key))
        else:
            yield (*path, str(key)), value


def _mistakes(kind: type[Recipe], data: Settings, errors: Sequence[ErrorDetails]) -> list[str]:
    """One line for each key of `data` with a mistake; of "a string or a mapping", those inside the
    mapping.
    """
    found: dict[str, list[str]] = {}
    paths = [_path(data, item) for item in errors]
    for keys, item in zip(paths, errors, strict=True):
        if not any(len(keys) < len(path) and path[: len(keys)] == keys for path in paths):
            found.setdefault(".".join(keys), _lines(kind, keys, item))
    return [line for lines in found.values() for line in lines]


def _path(tree: Any, item: ErrorDetails) -> Keys:
    """The keys that lead to a mistake: pydantic's, less the names that it gives to alternatives of
    a type.
    """
    keys = []
    for key in item["loc"]:
        tree = dict(enumerate(tree)) if isinstance(tree, list | tuple) else tree
        if isinstance(tree, Mapping) and key in tree:
            tree = tree[key]
            keys.append(str(key))
    return (*keys, *map(str, item["loc"][-1:] if item["type"] == "missing" else ()))


def _meant(kind: type[Recipe], keys: Keys) -> str:
    """What an unknown key may have meant: in its own section, then anywhere; else what is known."""
    section = re.sub(r"\.\d+", "[]", ".".join(keys[:-1]))
    every = {".".join(leaf.path): leaf.name for leaf in every_leaf(kind)}
    own = {path: name for path, name in every.items() if path.rpartition(".")[0] == section}
    for paths in (own, every):
        for name in difflib.get_close_matches(keys[-1], paths.values(), 1):
            return f'did you mean "{next(path for path in paths if paths[path] == name)}"?'
    return did_you_mean(keys[-1], (own or every).values())


def _lines(kind: type[Recipe], keys: Keys, item: ErrorDetails) -> list[str]:
    path = ".".join(keys)
    match item["type"]:
        case "extra_forbidden":
            return [f'unknown key "{path}"; {_meant(kind, keys)}']
        case "missing":
            flags = [leaf.flags[0] for leaf in leaves(kind).values() if leaf.path == keys]
            return [f"{path} is missing; name it{''.join(f' with {flag}' for flag in flags)}"]
        case "recipe":
            return [f"{path}: {line}" if path else line for line in item["msg"].split("\n")]
        case "literal_error" if isinstance(item["input"], str):
            choices = re.findall(r"'([^']*)'", item["msg"])
            return [f'{path}: unknown "{item["input"]}"; {did_you_mean(item["input"], choices)}']
    text = re.sub("(input )?should", "must", item["msg"], flags=re.IGNORECASE)
    text = re.sub(r"valid dictionary( or instance of \w+)?", "mapping of keys to values", text)
    return [f"{path}: {text[0].lower()}{text[1:]}, not {brief(item['input'])}"]
