"""The work of studies: fine-tunes and searches, each made once and kept by content, a few at a time."""

import inspect
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import torch

from deltafl.checkpoints.layout import file_hash
from deltafl.errors import DeltaflError
from deltafl.experiments.one_shot import BASE, SINGLE, run_search
from deltafl.experiments.studies.study import Data, Study, Training
from deltafl.forking import can_fork
from deltafl.merge.search import grid_of
from deltafl.merge.search_recipe import SearchRecipe
from deltafl.pool import Pool
from deltafl.rules.rule import Source, build_rule, check_rule, load_rules
from deltafl.tasks.arrays import arrays_of
from deltafl.training import TRAINING_JSON

T = TypeVar("T")
R = TypeVar("R")
Method: TypeAlias = tuple[str, Mapping[str, Any]]
"""A rule by name and its parameters; a list is a grid."""

OnStage = Callable[[str, int, int], None]
"""Told what is going on, how much of it is done, and of how much."""


@dataclass(frozen=True)
class Tuned:
    """A fine-tune: the data, the training, the seed."""

    data: Data
    training: Training
    seed: int


@dataclass(frozen=True)
class Merge:
    """A search over merges of fine-tunes that have one seed."""

    models: tuple[Tuned, ...]

    @property
    def seed(self) -> int:
        return self.models[0].seed


@dataclass(frozen=True)
class Work:
    """Does what studies ask for, `jobs` pieces at a time, each in a forked process that uses one core.

    Where processes cannot be forked (other systems, CUDA in use), one piece after the other, to the same results.
    """

    study: Study
    jobs: int
    on_stage: OnStage = lambda name, done, total: None

    def fine_tune(self, models: Iterable[Tuned]) -> None:
        """Make all the fine-tunes that are not there yet."""
        self.each("fine-tune", _tuned, list(dict.fromkeys(models)))

    def search(self, merges: Sequence[Merge]) -> list[dict[str, Any]]:
        """The results of searches, in order, fine-tunes first."""
        self.fine_tune(model for merge in merges for model in merge.models)
        return self.each("search", searched, merges)

    def each(self, stage: str, function: Callable[[Study, T], R], items: Sequence[T]) -> list[R]:
        """function(study, item) of every item, in order."""

        count, found = len(items), []
        workers = min(self.jobs, count) if can_fork() and not torch.cuda.is_initialized() else 1
        with Pool(lambda at: function(self.study, items[at]), workers) as pool:
            for result in pool.map(range(count)):
                found.append(result)
                self.on_stage(stage, len(found), count)
        return found


def _tuned(study: Study, model: Tuned) -> str:
    return str(study.model(model.data, model.training, model.seed))


def searched(study: Study, merge: Merge) -> dict[str, Any]:
    """What `run_search` found for a merge, from disk where it was found before.

    `left_out` in it: the methods that these models cannot be merged by (krum with too few), and why.
    """
    folders = [study.model(m.data, m.training, m.seed) for m in merge.models]
    trainings = [json.loads((folder / TRAINING_JSON).read_text()) for folder in folders]
    methods, left_out = able(seeded(study.methods, merge.seed), [_source(t) for t in trainings])
    config = {
        "models": [training["config"] for training in trainings],
        "judging": [study.judging(m.data, m.seed) for m in merge.models],
        "methods": [[name, dict(params), _code(name)] for name, params in methods],
        "left_out": left_out,
        "lambdas": study.lambdas,
        "strategy": study.strategy,
    }

    def search() -> dict[str, Any]:
        recipe = SearchRecipe.of(
            base=study.base,
            models=[
                {"path": str(folder), "data": m.data.spec}
                for folder, m in zip(folders, merge.models, strict=True)
            ],
            methods=[{"method": name, **params} for name, params in methods],
            scaling_coefs=study.lambdas,
            strategy=study.strategy,
            each_method=True,
            seed=merge.seed,
            threads=1,
            device=study.device,
        )
        tasks = [arrays_of(study.judged(m.data, m.seed)) for m in merge.models]
        result = run_search(recipe, None, tasks=tasks)
        asked = [[asdict(m.data), asdict(m.training)] for m in merge.models]
        kept = {k: v for k, v in result.items() if k not in ("candidates", "seconds", "versions")}
        return kept | {"left_out": left_out, "asked": asked}

    return study.kept("searches", config, search)


def seeded(methods: Sequence[Method], seed: int) -> list[Method]:
    """The methods, with the seed of the run for those that draw at random."""
    rules = load_rules()
    return [(n, rules[n].seeded(params, seed)) for n, params in methods]


def _code(method: str) -> str:
    """The hash of the file that a rule is written in: a changed rule is searched again."""
    return file_hash([Path(inspect.getfile(load_rules()[method]))])


def _source(training: Mapping[str, Any]) -> Source:
    return Source(
        training["task"], num_steps=training["num_steps"], num_examples=training["num_examples"]
    )


def able(
    methods: Sequence[Method], sources: Sequence[Source]
) -> tuple[list[Method], dict[str, str]]:
    """The methods that these models can be merged by, and why the others cannot."""
    good, left_out = [], {}
    for name, params in methods:
        try:
            for point in grid_of(name, params, (1.0, 1.0)):
                check_rule(build_rule(name, point), sources)
            good.append((name, params))
        except DeltaflError as error:
            left_out[name] = str(error)
    return good, left_out


def settled(result: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Rule -> its row; the base's, lambda 0, where validation puts that above everything that the rule gives."""
    rows = {row["rule"]: row for row in result["rows"]}
    rows.pop(SINGLE)
    base = rows.pop(BASE)
    return {
        name: row if row["val"] >= base["val"] else {**base, "rule": name}
        for name, row in rows.items()
    }


def normalised(row: Mapping[str, Any]) -> float:
    """A row's normalised test accuracy; NaN where a task's own model is right on no test image."""
    return math.nan if row["normalized"] is None else row["normalized"]


def row_of(result: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """The row of the single-task models or of the base."""
    return next(row for row in result["rows"] if row["rule"] == name)
