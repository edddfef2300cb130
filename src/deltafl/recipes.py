"""Recipes: one class per command, the only place where its settings are written.

The fields of a `Recipe`, with their types, ranges and descriptions, are the keys of its YAML file, the options of its
command, `--help`, the errors, the page of the documentation and the JSON schema. A field that is a Recipe itself is a
section: `sparse: {sparsity_ratio: 0.9}` in the file, `--sparsity-ratio 0.9` on the command line.
"""

import difflib
import functools
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self, TypeAlias, TypeVar, get_args

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    SerializerFunctionWrapHandler,
    TypeAdapter,
    ValidationError,
    WithJsonSchema,
    create_model,
    field_validator,
    model_serializer,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic_core import CoreSchema, ErrorDetails, PydanticCustomError, core_schema

from deltafl.errors import DeltaflError, did_you_mean

R = TypeVar("R", bound="Recipe")
T = TypeVar("T")


class Recipe(BaseModel):
    """The settings of a command, or a section of them: frozen, no unknown keys, no silent conversion.

    Annotate sequences as tuples; a list of the file becomes one. Leaves (what is no section) have unique names.

    renamed: path of an old key -> path of the new one, or a sentence that says why there is none.
    alternatives: groups of leaves that say one thing; an option of a group replaces all of the group in the file.
    defaults: of fields that are those of the parent class but for their default.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)
    renamed: ClassVar[Mapping[str, str]] = {}
    alternatives: ClassVar[Sequence[Collection[str]]] = ()
    defaults: ClassVar[Mapping[str, Any]] = {}

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        """Set the defaults."""
        for name, value in cls.defaults.items():
            cls.model_fields[name].default = value
        if cls.defaults:
            cls.model_rebuild(force=True)

    @classmethod
    def of(cls, **settings: Any) -> Self:
        """The recipe with these leaves, and defaults for the others. Raises DeltaflError."""
        return read_recipe(cls, settings=settings)

    def replace(self, **settings: Any) -> Self:
        """The same recipe with other values of some leaves, checked as a whole. Raises DeltaflError."""
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
                functools.reduce(dict.__getitem__, leaf.path[:-1], data).pop(leaf.name)
        return data

    @field_validator("*", mode="before")
    @classmethod
    def _as_tuple(cls, value: Any) -> Any:
        return tuple(map(cls._as_tuple, value)) if isinstance(value, list) else value

    @model_validator(mode="before")
    @classmethod
    def _gather(cls, data: Any) -> Any:
        for name, flattened in _flattened(cls).items() if isinstance(data, dict) else ():
            keys = flattened.fields().keys() - cls.model_fields.keys()
            held = {key: data[key] for key in data if key in keys and data[key] is not None}
            data = {key: value for key, value in data.items() if key not in keys}
            data[name] = {**data.get(name, {}), **held}
        return data

    @model_validator(mode="after")
    def _check(self) -> Self:
        if found := list(self.problems()):
            raise problem(*found)
        return self

    @model_serializer(mode="wrap")
    def _spread(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        data = handler(self)
        for name in _flattened(type(self)):
            data |= data.pop(name)
        return data

    @classmethod
    def __get_pydantic_json_schema__(
        cls, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        """As pydantic's, with the keys of flattened fields beside the others, and the short form of sections."""
        found = handler.resolve_ref_schema(handler(schema))
        for name, field in cls.model_fields.items():
            if (inner := section(field)) and name in inner.model_fields:
                short = TypeAdapter[Any](inner.model_fields[name].annotation or Any).json_schema()
                found["properties"][name] = {"anyOf": [found["properties"][name], short]}
        for name, flattened in _flattened(cls).items():
            del found["properties"][name]
            for key, field in flattened.fields().items():
                about = {"description": field.description}
                found["properties"].setdefault(
                    key, TypeAdapter[Any](field.annotation or Any).json_schema() | about
                )
        return found


class Incidental:
    """Marks a setting that decides no number: `out: Annotated[str, Incidental]`. No result depends on it."""


@dataclass(frozen=True)
class Flags:
    """Marks a setting whose options are not named as it is; without names it has none."""

    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class OneOf:
    """Marks a string that must be one of the names that a registry holds."""

    names: Callable[[], Iterable[str]]

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        """The string's own schema, then the check."""

        def check(value: str) -> str:
            if value not in (known := list(self.names())):
                raise problem(f'unknown "{value}"; {did_you_mean(value, known)}')
            return value

        return core_schema.no_info_after_validator_function(check, handler(source))


@dataclass(frozen=True)
class Flattened:
    """Marks a mapping whose keys stand beside its siblings and are named elsewhere: the parameters of a rule.

    fields: key -> its type and description. A key that is missing keeps the default of what it is a parameter of.
    """

    fields: Callable[[], Mapping[str, FieldInfo]]

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        """A mapping of the given keys only, each with its own type."""

        def check(value: Any) -> Any:
            kinds: dict[str, Any] = {k: (f.annotation, None) for k, f in self.fields().items()}
            keyed = create_model("Keyed", __config__=Recipe.model_config, **kinds)
            return keyed.model_validate(value).model_dump(exclude_unset=True)

        return core_schema.no_info_before_validator_function(check, handler(source))


UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def parse_size(size: int | str) -> int:
    """ "5GB", "300MiB" or bytes -> bytes. Raises ValueError."""
    found = re.fullmatch(r"\s*([\d.]+(?:[eE]\d+)?)\s*([A-Za-z]*)\s*", str(size))
    try:
        return int(float(found[1]) * UNITS[found[2].upper()]) if found else int("")
    except (ValueError, KeyError, OverflowError):
        raise problem(f'"{size}" is not a size; write 5GB or 300MB') from None


Size: TypeAlias = Annotated[
    int, BeforeValidator(parse_size), WithJsonSchema({"type": ["integer", "string"]})
]
"""Bytes; in a file or an option also as 5GB or 300MiB."""


def problem(*lines: str) -> PydanticCustomError:
    """What a validator raises to say in its own words what is wrong; the key's path goes before each line."""
    return PydanticCustomError("recipe", "{text}", {"text": "\n".join(lines)})


@dataclass(frozen=True)
class Leaf:
    """A setting: its name, the keys that lead to it, and whether it is a key of a flattened mapping."""

    name: str
    path: tuple[str, ...]
    field: FieldInfo
    flattened: bool = False

    @property
    def flags(self) -> tuple[str, ...]:
        """Its options, `--num-clients`, unless its type cannot be one."""
        flags = mark_of(self.field, Flags)
        return flags.names if flags else (f"--{self.name.replace('_', '-')}",)


def leaves(kind: type[Recipe], path: tuple[str, ...] = ()) -> dict[str, Leaf]:
    """Name -> leaf of a recipe and its sections, in order. Raises TypeError if a name is used twice."""
    found: dict[str, Leaf] = {}
    for name, field in kind.model_fields.items():
        key = field.alias or name
        if inner := section(field):
            new = leaves(inner, (*path, key))
        elif mark := mark_of(field, Flattened):
            fields = mark.fields()
            new = {k: Leaf(k, (*path, k), f, flattened=True) for k, f in fields.items()}
        else:
            new = {key: Leaf(key, (*path, key), field)}
        for leaf in new.values():
            other = found.get(leaf.name)
            if other and not other.flattened and not leaf.flattened:
                raise TypeError(f"{kind.__name__}: {other.path} and {leaf.path} share a name")
            if not other or other.flattened:
                found[leaf.name] = leaf
    return found


def mark_of(field: FieldInfo, kind: type[T]) -> T | None:
    """The mark of one kind in a field's annotation."""
    return next((mark for mark in field.metadata if isinstance(mark, kind)), None)


def section(field: FieldInfo) -> type[Recipe] | None:
    """The recipe that a field holds, if it is a section."""
    kind = field.annotation
    return kind if isinstance(kind, type) and issubclass(kind, Recipe) else None


def _flattened(kind: type[Recipe]) -> dict[str, Flattened]:
    marks = {name: mark_of(field, Flattened) for name, field in kind.model_fields.items()}
    return {name: mark for name, mark in marks.items() if mark}


def read_recipe(
    kind: type[R],
    file: str | Path | Mapping[str, Any] | None = None,
    settings: Mapping[str, Any] | None = None,
    *,
    defaults: Mapping[str, Any] | None = None,
) -> R:
    """The recipe of a file, or its content, with leaves in `settings` over it and leaves in `defaults` under it.

    Raises:
        DeltaflError: one line for each mistake, with the path of the key.
    """
    data = load_yaml(file) if isinstance(file, str | Path) else file or {}
    told, found = _values(kind, data)
    asked, more = _values(kind, settings or {}, anywhere=True)
    values = _over(kind, _over(kind, defaults or {}, told), asked)
    nested: dict[str, Any] = {}
    for leaf in leaves(kind).values():
        place = nested
        for key in leaf.path[:-1]:
            place = place.setdefault(key, {})
        if leaf.name in values:
            place[leaf.name] = values[leaf.name]
    found += more
    try:
        recipe = kind.model_validate(nested)
    except ValidationError as error:
        found += _problems(kind, nested, error.errors())
    else:
        if not found:
            return recipe
    raise DeltaflError(*found)


def _over(kind: type[Recipe], below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """The leaves of both, those in `above` first, and of `below` only what they are no alternative to."""
    groups = [group for group in kind.alternatives if not above.keys().isdisjoint(group)]
    replaced = {name for group in groups for name in group}
    return {name: value for name, value in below.items() if name not in replaced} | {**above}


def _values(
    kind: type[Recipe], data: Mapping[str, Any], *, anywhere: bool = False
) -> tuple[dict[str, Any], list[str]]:
    """Leaf -> value, of nested mappings or, `anywhere`, side by side; and a line for each key out of place.

    `head: ridge` is short for `head: {head: ridge}`.
    """
    known, values, found = leaves(kind), dict[str, Any](), list[str]()
    for path, value in _walk(kind, data):
        key, leaf = ".".join(path), known.get(path[-1])
        new = kind.renamed.get(key) or (leaf and ".".join(leaf.path))
        if new:
            values.setdefault(new.rpartition(".")[2], value)
            if " " in new:
                found.append(f'"{key}": {new}')
            elif not anywhere and new not in (key, f"{key}.{path[-1]}"):
                found.append(f'"{key}" is now "{new}"')
        elif path[-1] in kind.model_fields:
            found.append(f"{key}: must be a mapping of keys to values, not {value!r}")
        elif kind.model_config.get("extra") == "forbid":
            found.append(f'unknown key "{key}"; {_meant(kind, path)}')
    return values, found


def _walk(
    kind: type[Recipe], data: Mapping[str, Any], path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], Any]]:
    """The keys that lead to each value, through sections."""
    for key, value in data.items():
        inner = section(kind.model_fields[key]) if key in kind.model_fields else None
        value = value.resolved() if isinstance(value, Recipe) else value
        if inner and isinstance(value, Mapping):
            yield from _walk(inner, value, (*path, key))
        else:
            yield (*path, str(key)), value


def _problems(
    kind: type[Recipe], data: Mapping[str, Any], errors: Sequence[ErrorDetails]
) -> list[str]:
    """One line for each key of `data` with a mistake; of "a string or a mapping", those inside the mapping."""
    found: dict[str, list[str]] = {}
    paths = [_path(data, item) for item in errors]
    for keys, item in zip(paths, errors, strict=True):
        if not any(len(keys) < len(path) and path[: len(keys)] == keys for path in paths):
            found.setdefault(".".join(keys), _lines(kind, keys, item))
    return [line for lines in found.values() for line in lines]


def _path(tree: Any, item: ErrorDetails) -> list[str]:
    """The keys that lead to a mistake: pydantic's, less the names that it gives to alternatives of a type."""
    keys = []
    for key in item["loc"]:
        tree = dict(enumerate(tree)) if isinstance(tree, list | tuple) else tree
        if isinstance(tree, Mapping) and key in tree:
            tree = tree[key]
            keys.append(str(key))
    return [*keys, str(item["loc"][-1])] if item["type"] == "missing" else keys


def _lines(kind: type[Recipe], keys: list[str], item: ErrorDetails) -> list[str]:
    path, value = ".".join(keys), item["input"]
    if item["type"] == "extra_forbidden":
        return [f'unknown key "{path}"; {_meant(kind, keys)}']
    if item["type"] == "missing":
        leaf = leaves(kind).get(keys[-1])
        flags = leaf.flags if leaf and leaf.path == (*keys,) else ()
        remedy = f"name it with {flags[0]}" if flags else "name it"
        return [f"{path} is missing; {remedy}"]
    if item["type"] == "recipe":
        return [f"{path}: {line}" if path else line for line in item["msg"].split("\n")]
    if item["type"] == "literal_error" and isinstance(value, str):
        choices = re.findall(r"'([^']*)'", item["msg"])
        return [f'{path}: unknown "{value}"; {did_you_mean(value, choices)}']
    text = re.sub("(input )?should", "must", item["msg"], flags=re.IGNORECASE)
    text = re.sub(r"valid dictionary( or instance of \w+)?", "mapping of keys to values", text)
    return [f"{path}: {text[0].lower()}{text[1:]}, not {value!r}"]


def _meant(kind: type[Recipe], keys: Sequence[str]) -> str:
    """Which key an unknown one may have been meant to be: one of its section, or else of any."""
    kinds = [kind]
    for key in (key for key in keys[:-1] if not key.isdigit()):
        if fields := [k.model_fields[key] for k in kinds if key in k.model_fields]:
            kinds = [k for field in fields for k in recipes_in(field.annotation)]
    here, known = {leaf.path[0] for k in kinds for leaf in leaves(k).values()}, leaves(kind)
    close = difflib.get_close_matches(keys[-1], known, 1)
    if close and not difflib.get_close_matches(keys[-1], here, 1):
        return f'did you mean "{".".join(known[close[0]].path)}"?'
    return did_you_mean(keys[-1], here)


def recipes_in(annotation: Any) -> list[type[Recipe]]:
    """The recipes in a type, such as that of the mappings in a list."""
    if isinstance(annotation, type) and issubclass(annotation, Recipe):
        return [annotation]
    return [k for part in get_args(annotation) for k in recipes_in(part)]


class _Loader(yaml.SafeLoader):
    """YAML in which 1e-5 is a number, as in YAML 1.2, and a key given twice is a mistake."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    problem=f'"{key.value}" is given twice', problem_mark=key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def load_yaml(path: str | Path) -> dict[str, Any]:
    """A YAML file that holds a mapping. Raises DeltaflError."""
    try:
        data = yaml.load(Path(path).read_text(encoding="utf-8"), _Loader)  # a SafeLoader
    except OSError as error:
        raise DeltaflError(f'"{path}": {error.strerror}') from None
    except (yaml.YAMLError, ValueError, TypeError) as error:
        raise DeltaflError(f'"{path}": is not YAML: {" ".join(str(error).split())}') from None
    if not isinstance(data, dict):
        raise DeltaflError(f'"{path}": must be a mapping of keys to values')
    return data
