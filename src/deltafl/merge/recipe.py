"""Recipes: YAML files, checked whole. Every mistake is one line with the key's path, all at once."""

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from deltafl.errors import DeltaflError, did_you_mean
from deltafl.merge.plan import MergeSpec, Model
from deltafl.rules.rule import load_rules, parameters

M = TypeVar("M", bound=BaseModel)


class Strict(BaseModel):
    """No unknown keys, no silent conversion between strings, numbers and truth values."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class ModelEntry(Strict):
    """One entry of `models:`."""

    path: str
    name: str | None = None
    weight: float = 1.0
    num_steps: int | None = None
    num_examples: int | None = None


class MergeRecipe(BaseModel):
    """`deltafl merge RECIPE.yaml`: the same names as the options, and the method's parameters beside them."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True)

    base: str
    models: list[str | ModelEntry] = Field(min_length=1)
    method: str = "task_arithmetic"
    server_lr: float | None = None
    scaling_coef: float | None = None
    weights: list[float] | None = None
    weight_patterns: dict[str, list[float]] = {}
    scale_patterns: dict[str, float] = {}
    num_steps: list[int] | None = None
    num_examples: list[int] | None = None
    scope: str = ""
    include: list[str] = []
    exclude: list[str] = []
    dtype: Literal["float32", "float16", "bfloat16", "float64"] | None = None
    device: str = "cpu"
    exact: bool = False
    threads: int = Field(0, ge=0)
    max_shard_size: int | str = "5GB"
    hash: bool = False
    allow_other_base: bool = False
    out: str | None = None
    overwrite: bool = False

    def spec(self) -> MergeSpec:
        """What the library takes. Raises DeltaflError with every mistake."""
        problems = _per_model(self)
        params = _rule_params(self, problems)
        if problems:
            raise DeltaflError(*problems)
        if self.weights is not None and any(
            isinstance(m, ModelEntry) and m.weight != 1.0 for m in self.models
        ):
            raise DeltaflError(
                "weights: given both as a list and beside the models; give them in one place"
            )
        entries = [m if isinstance(m, ModelEntry) else ModelEntry(path=m) for m in self.models]
        weights = self.weights
        if weights is None and any(e.weight != 1.0 for e in entries):
            weights = [e.weight for e in entries]
        return MergeSpec(
            base=self.base,
            models=_named(entries, self.num_steps, self.num_examples),
            method=self.method,
            params=params,
            server_lr=self.server_lr,
            scaling_coef=self.scaling_coef,
            weights=tuple(weights) if weights is not None else None,
            weight_patterns=tuple((p, tuple(w)) for p, w in self.weight_patterns.items()),
            scale_patterns=tuple(self.scale_patterns.items()),
            scope=self.scope,
            include=tuple(self.include),
            exclude=tuple(self.exclude),
            dtype={"float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F64"}.get(
                self.dtype or ""
            ),
            device=self.device,
            exact=self.exact,
            threads=self.threads,
            max_shard_size=parse_size(self.max_shard_size),
            full_hash=self.hash,
            allow_other_base=self.allow_other_base,
        )


def _per_model(recipe: MergeRecipe) -> list[str]:
    n = len(recipe.models)
    return [
        f"{key}: {len(values)} numbers for {n} models"
        for key in ("num_steps", "num_examples", "weights")
        if (values := getattr(recipe, key)) is not None and len(values) != n
    ]


def _named(
    entries: list[ModelEntry], steps: list[int] | None, examples: list[int] | None
) -> tuple[Model, ...]:
    """Models with distinct names: the last part of the path, where two share it the path, and at worst a number."""
    models: list[Model] = []
    last = [Path(entry.path).name for entry in entries]
    for i, entry in enumerate(entries):
        name = wish = entry.name or (
            last[i] if last.count(last[i]) == 1 and last[i] else entry.path
        )
        number = 2
        while name in {m.name for m in models}:
            name, number = f"{wish}#{number}", number + 1
        models.append(
            Model(
                entry.path,
                name,
                steps[i] if steps else entry.num_steps,
                examples[i] if examples else entry.num_examples,
            )
        )
    return tuple(models)


def _rule_params(recipe: MergeRecipe, problems: list[str]) -> dict[str, Any]:
    """The method's parameters, checked for type; unknown keys become problems."""
    given = {k: v for k, v in (recipe.model_extra or {}).items() if v is not None}
    try:
        return check_params(given, MergeRecipe.model_fields)
    except DeltaflError as error:
        problems.extend(error.problems)
        return {}


def check_params(given: Mapping[str, Any], beside: Collection[str] = ()) -> dict[str, Any]:
    """Parameters of rules, checked for type. `beside`: other keys that may have been meant.

    Raises DeltaflError for keys that are no rule's and for values of another type, all at once.
    """
    rules = load_rules()
    hints = {key: hint for name in rules for key, (hint, _) in parameters(rules[name]).items()}
    params, problems = {}, []
    for key, value in given.items():
        if key not in hints:
            problems.append(f'unknown key "{key}"; {did_you_mean(key, {*beside, *hints})}')
            continue
        try:
            params[key] = (
                str(value)
                if key == "inner"
                else TypeAdapter(hints[key]).validate_python(value, strict=True)
            )
        except ValidationError as error:
            problems.append(f"{key}: {_said(error.errors()[0])}")
    if problems:
        raise DeltaflError(*problems)
    return params


def parse_size(size: int | str) -> int:
    """ "5GB", "300MiB" or bytes -> bytes. Raises DeltaflError."""
    units = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
    units |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
    text = str(size).strip().upper()
    digits = text.rstrip("KMGTIB ")
    try:
        value = int(float(digits) * units[text[len(digits) :].strip()])
    except (ValueError, KeyError, OverflowError):
        raise DeltaflError(f'max_shard_size: "{size}" is not a size; write 5GB or 300MB') from None
    if value <= 0:
        raise DeltaflError(f'max_shard_size: "{size}" must be above 0')
    return value


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
        held = yaml.load(Path(path).read_text(encoding="utf-8"), _Loader)  # a SafeLoader
    except OSError as error:
        raise DeltaflError(f'"{path}": {error.strerror}') from None
    except (yaml.YAMLError, ValueError, TypeError) as error:
        raise DeltaflError(f'"{path}": is not YAML: {" ".join(str(error).split())}') from None
    if not isinstance(held, dict):
        raise DeltaflError(f'"{path}": must be a mapping of keys to values')
    return held


def parse(kind: type[M], held: dict[str, Any]) -> M:
    """The recipe `kind` from a mapping. Raises DeltaflError with one line for each mistake."""
    try:
        return kind.model_validate(held)
    except ValidationError as error:
        problems: dict[str, str] = {}
        for item in error.errors():
            if item["loc"][-1] == "str" and isinstance(item["input"], dict):
                continue  # of "a string or a mapping" it was meant to be the mapping, whose own mistakes follow
            keys = [
                str(k)
                for k in item["loc"]
                if k not in _BRANCHES and not str(k).startswith("function-")
            ]
            path = ".".join(keys)
            if item["type"] == "extra_forbidden":
                problems[path] = (
                    f'unknown key "{path}"; {did_you_mean(keys[-1], _siblings(kind, keys))}'
                )
            else:
                problems.setdefault(path, f"{path}: {_said(item)}")
        raise DeltaflError(*problems.values()) from None


_BRANCHES = ("str", "int", "ModelEntry")
"""What pydantic adds to the path of a value for the alternatives of its type."""


def _siblings(kind: type[BaseModel], keys: list[str]) -> set[str]:
    """The keys that may stand where an unknown one was found."""
    kinds = [kind]
    for key in keys[:-1]:
        if not key.isdigit():
            fields = [k.model_fields[key] for k in kinds if key in k.model_fields]
            kinds = [k for field in fields for k in _recipes_in(field.annotation)]
    return {field.alias or name for k in kinds for name, field in k.model_fields.items()}


def _recipes_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [k for part in get_args(annotation) for k in _recipes_in(part)]


def _said(item: Any) -> str:
    text = item["msg"][0].lower() + item["msg"][1:]
    return text if item["type"] == "missing" else f"{text}, not {item['input']!r}"
