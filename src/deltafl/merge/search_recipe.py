"""The recipe of `deltafl search`."""

from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import Field

from deltafl.errors import DeltaflError
from deltafl.experiments.one_shot import SearchSpec, TaskModel
from deltafl.experiments.quickstart import METHODS
from deltafl.merge.recipe import MergeRecipe, ModelEntry, Strict, check_params, parse_size
from deltafl.merge.search import LAMBDAS, Row, check_strategy
from deltafl.models.heads import ZERO_SHOT


class SearchEntry(ModelEntry):
    """One entry of `models:`: a fine-tune, the data of its task, and its head if that is not in its folder."""

    data: str
    head: str | None = None


class SearchRecipe(Strict):
    """`deltafl search RECIPE.yaml`.

    methods: names, or mappings with `method` and its parameters, of which each may be a list; default: every rule of
    arXiv 2411.18607. grid "default": scaling_coefs multiply the sum of deltas for all methods; "paper": each method's
    own convention. strategy "racing": drop a candidate as soon as a bound of this confidence says that it cannot win;
    each_method: within its method, so that the best of every method is exact.
    templates: a file of prompts for the zero-shot heads. fixed: row of the table -> method, scaling_coef and
    parameters of a candidate that is tested as it is, beside what the search chooses. reference: row of the table ->
    mean test accuracy in percent that was published, shown beside ours; a name that no row has is a row of its own.
    """

    base: str
    models: list[SearchEntry] = Field(min_length=1)
    methods: list[str | dict[str, Any]] | None = Field(None, min_length=1)
    scaling_coefs: list[float] = Field(list(LAMBDAS), min_length=1)
    grid: Literal["default", "paper"] = "default"
    metric: Literal["normalized", "absolute"] = "normalized"
    strategy: str = "exhaustive"
    confidence: float = 0.95
    each_method: bool = False
    weights: list[float] | None = None
    scope: str = ""
    include: list[str] = Field([])
    exclude: list[str] = Field([])
    device: str = "cpu"
    threads: int = Field(0, ge=0)
    memory: int | str = "8GB"
    batch_size: int = Field(256, ge=1)
    seed: int | None = None
    data_dir: str | None = None
    templates: str | None = None
    fixed: dict[str, dict[str, Any]] = Field({})
    reference: dict[str, Annotated[float, Field(ge=0, le=100)]] = Field({})
    allow_other_base: bool = False
    out: str | None = None
    overwrite: bool = False

    def spec(self) -> SearchSpec:
        """What the library takes. Raises DeltaflError with every mistake."""
        check_strategy(self.strategy, self.confidence)
        if self.templates is not None and not any(entry.head == ZERO_SHOT for entry in self.models):
            raise DeltaflError(
                "templates: are about the zero-shot head; give models that have head: zero-shot"
            )
        plain = MergeRecipe(
            base=self.base,
            models=[ModelEntry(**e.model_dump(exclude={"data", "head"})) for e in self.models],
            **self.model_dump(
                include={
                    "weights",
                    "scope",
                    "include",
                    "exclude",
                    "device",
                    "threads",
                    "allow_other_base",
                }
            ),
        ).spec()
        models = zip(plain.models, self.models, strict=True)
        return SearchSpec(
            merge=replace(plain, scaling_coef=None),
            models=tuple(TaskModel(model, entry.data, entry.head) for model, entry in models),
            methods=tuple(_methods(self.methods)),
            lambdas=tuple(self.scaling_coefs),
            native_scale=self.grid == "paper",
            metric=self.metric,
            strategy=self.strategy,
            confidence=self.confidence,
            each_method=self.each_method,
            memory=_memory(self.memory),
            batch_size=self.batch_size,
            seed=self.seed,
            data_dir=self.data_dir,
            templates=self.templates,
            fixed=tuple(_fixed(self.fixed)),
        )


def _fixed(entries: dict[str, dict[str, Any]]) -> list[tuple[str, Row]]:
    """(name, candidate) of each entry. Raises DeltaflError."""
    found, problems = [], []
    for name, entry in entries.items():
        coefficient = entry.get("scaling_coef")
        if not isinstance(coefficient, int | float) or isinstance(coefficient, bool):
            problems.append(f"fixed.{name}: scaling_coef must be a number, not {coefficient!r}")
            continue
        try:
            ((method, params),) = _methods(
                [{k: v for k, v in entry.items() if k != "scaling_coef"}]
            )
            found.append((name, Row(method, params, float(coefficient), 0.0)))
        except DeltaflError as error:
            problems += [f"fixed.{name}: {p.removeprefix('methods: ')}" for p in error.problems]
    if problems:
        raise DeltaflError(*problems)
    return found


def _memory(size: int | str) -> int:
    """Bytes; 0: hold nothing, read again. Raises DeltaflError."""
    if str(size).strip() == "0":
        return 0
    try:
        return parse_size(size)
    except DeltaflError as error:
        raise DeltaflError(
            *(f"memory: {p.removeprefix('max_shard_size: ')}" for p in error.problems)
        ) from None


def _methods(entries: list[str | dict[str, Any]] | None) -> list[tuple[str, dict[str, Any]]]:
    """(name, parameters) of each entry; a list among the parameters is a grid. Raises DeltaflError."""
    if entries is None:
        return [(name, dict(params)) for name, params in METHODS]
    found, problems = [], []
    for entry in entries:
        held = {"method": entry} if isinstance(entry, str) else dict(entry)
        name = held.pop("method", None)
        if not isinstance(name, str):
            problems.append(
                f"methods: {entry!r} does not say which method it is; write {{method: NAME, ...}}"
            )
            continue
        try:
            for key, value in held.items():
                for one in value if isinstance(value, list) else [value]:
                    check_params({key: one})
        except DeltaflError as error:
            problems += [f"methods: {name}: {p}" for p in error.problems]
        found.append((name, held))
    if problems:
        raise DeltaflError(*problems)
    return found
