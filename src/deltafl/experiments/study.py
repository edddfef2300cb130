"""The works of one-shot studies: heads, fine-tunes, and searches over merges of these."""

import inspect
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from deltafl.checkpoints.layout import file_hash
from deltafl.errors import DeltaflError
from deltafl.experiments.sweep import Result, Store, Work
from deltafl.files import atomic_folder
from deltafl.merge.candidates import Method, grid_of
from deltafl.merge.search_recipe import SearchRecipe
from deltafl.merge.search_run import SINGLE, UNMERGED, run_search
from deltafl.models import HEAD_FILE, HeadFit, Net, load_net
from deltafl.rules.rule import Source, build_rule, check_rule, load_rules
from deltafl.seeding import keyed_generator
from deltafl.tasks import Task, load_task
from deltafl.tasks.classes import class_groups, only_classes
from deltafl.tasks.recipe import TrainingDataRecipe
from deltafl.tasks.selection import stratified
from deltafl.tasks.task import Split, hash_of
from deltafl.training import TrainingRecipe, finetune


@dataclass(frozen=True)
class Data:
    """A data set by its spec, or one of `parts` groups of its classes, dealt at random by the seed.

    head: the data set that its head is made from; None: itself, whole.
    """

    spec: str
    part: int = 0
    parts: int = 1
    head: str | None = None


@dataclass(frozen=True, eq=False)
class Study:
    """What all works of the studies of one command share.

    base: the folder of the base model. training: of every fine-tune, whose lr and steps the works
    choose. training_of: lr and steps of studies that need one training. methods: a list among the
    parameters is a grid. seeds: one for each run. val_limit, test_limit: examples of each task that
    merges are judged on.
    """

    base: str
    tasks: tuple[str, ...]
    training: TrainingRecipe
    lrs: tuple[float, ...]
    steps: tuple[int, ...]
    methods: tuple[Method, ...]
    lambdas: tuple[float, ...]
    control: str
    domains: tuple[str, ...]
    split: str
    seeds: tuple[int, ...]
    draws: int = 4
    strategy: str = "racing"
    val_limit: int | None = None
    test_limit: int | None = None
    device: str = "cpu"

    @property
    def lr(self) -> float:
        """Of studies that need one: the second of several, or the only one."""
        return self.lrs[min(1, len(self.lrs) - 1)]

    def tuned(self, data: Data, seed: int) -> "FineTune":
        """The fine-tune of studies that need one training: with the most steps."""
        return FineTune(self, data, self.lr, max(self.steps), seed)

    def task(self, data: Data, seed: int) -> Task:
        """A task with the validation split of a seed: what models and heads are made from."""
        whole = _task(self.training.data.replace(data=data.spec).model_dump_json(), self.base, seed)
        if data.parts == 1:
            return whole
        classes = int(whole.groups("train").max()) + 1
        generator = keyed_generator(seed, "classes", data.parts)
        group = class_groups(classes, data.parts, generator)[data.part]
        return only_classes(whole, group, f"{whole.name}_{data.part + 1}of{data.parts}")

    def judged(self, data: Data, seed: int) -> Task:
        """The task with no more validation and test examples than merges are judged on."""
        task = self.task(data, seed)
        rows = {"train": torch.arange(task.size("train"))}
        limits: dict[Split, int | None] = {"val": self.val_limit, "test": self.test_limit}
        for split, most in limits.items():
            rows[split] = torch.arange(task.size(split))
            if most is not None:
                groups, rng = task.groups(split).numpy(), np.random.default_rng([seed, most])
                rows[split] = torch.from_numpy(stratified(groups, most, rng))
        return task.only(rows, task.name)


@lru_cache(maxsize=2)
def base_net(ref: str) -> Net:
    """A model, read once in each process. Not to be changed."""
    return load_net(ref)


@lru_cache(maxsize=2)
def base_hash(ref: str) -> str:
    """Of what trains of it."""
    return hash_of(base_net(ref).flat.detach())


@lru_cache(maxsize=16)
def _task(recipe: str, base: str, seed: int) -> Task:
    return load_task(TrainingDataRecipe.model_validate_json(recipe), base_net(base).inputs, seed)


@dataclass(frozen=True)
class Head(Work):
    """The frozen head of a data set, made from the base model; parts of it share it."""

    study: Study
    spec: str
    seed: int
    kind: ClassVar[str] = "heads"

    def content(self, store: Store) -> Mapping[str, Any]:
        return {
            "base": base_hash(self.study.base),
            "task": self.study.task(Data(self.spec), self.seed).fingerprint(),
            "head": self.study.training.head.content(),
            "seed": self.seed,
        }

    def title(self) -> str:
        return self.study.task(Data(self.spec), self.seed).name

    def run(self, folder: Path, store: Store) -> Result:
        net = base_net(self.study.base).copy_to(self.study.device)
        task = self.study.task(Data(self.spec), self.seed)
        net.prepare(task, self.study.training.head, HeadFit(self.seed))
        with atomic_folder(folder, overwrite=True) as scratch:
            net.save_head(scratch)
        return {}


@dataclass(frozen=True)
class FineTune(Work):
    """The base model fine-tuned on a task with the head of its data set."""

    study: Study
    data: Data
    lr: float
    steps: int
    seed: int
    kind: ClassVar[str] = "fine-tunes"

    @property
    def head(self) -> Head:
        """The work that makes its head."""
        return Head(self.study, self.data.head or self.data.spec, self.seed)

    @property
    def task(self) -> Task:
        """What it is trained on."""
        return self.study.task(self.data, self.seed)

    def recipe(self, store: Store) -> TrainingRecipe:
        """How it is trained."""
        head = str(store.place(self.head) / HEAD_FILE)
        own = {"lr": self.lr, "steps": self.steps, "seed": self.seed, "data": self.data.spec}
        return self.study.training.replace(
            **own, head=head, few_shot=None, templates=None, overwrite=True
        )

    def needs(self) -> Iterable[Work]:
        return (self.head,)

    def content(self, store: Store) -> Mapping[str, Any]:
        recipe = self.study.training.replace(lr=self.lr, steps=self.steps, seed=self.seed)
        return {
            **self.head.content(store),
            "task": self.task.fingerprint(),
            "training": {k: v for k, v in recipe.content().items() if k not in ("head", "data")},
        }

    def title(self) -> str:
        return f"{self.task.name}-lr{self.lr:g}-steps{self.steps}-seed{self.seed}"

    def run(self, folder: Path, store: Store) -> Result:
        net = base_net(self.study.base)
        done = finetune(net, self.task, self.recipe(store).replace(out=str(folder)), resume=True)
        return done.training

    def judging(self) -> Task:
        """The task that a merge with it is judged on."""
        return self.study.judged(self.data, self.seed)

    def source(self, store: Store) -> Source:
        """What is known of it, for rules."""
        training = store.result(self)
        steps, examples = training["num_steps"], training["num_examples"]
        return Source(training["task"], num_steps=steps, num_examples=examples)


@dataclass(frozen=True)
class Search(Work):
    """A search over merges of fine-tunes that have one study and seed."""

    models: tuple[FineTune, ...]
    strategy: str
    kind: ClassVar[str] = "searches"

    @property
    def study(self) -> Study:
        return self.models[0].study

    @property
    def seed(self) -> int:
        return self.models[0].seed

    def needs(self) -> Iterable[Work]:
        return self.models

    def methods(self, store: Store) -> tuple[list[Method], dict[str, str]]:
        """Those that these models can be merged by, and why the others cannot."""
        sources = [model.source(store) for model in self.models]
        good, left_out = [], {}
        for name, given in self.study.methods:
            params = load_rules()[name].seeded(given, self.seed)
            try:
                for point in grid_of(name, params, (1.0, 1.0)):
                    check_rule(build_rule(name, point), sources)
                good.append((name, params))
            except DeltaflError as error:
                left_out[name] = str(error)
        return good, left_out

    def content(self, store: Store) -> Mapping[str, Any]:
        good, left_out = self.methods(store)
        code = {name: file_hash([Path(inspect.getfile(load_rules()[name]))]) for name, _ in good}
        return {
            "models": [model.content(store) for model in self.models],
            "judging": [model.judging().fingerprint() for model in self.models],
            "methods": [[name, dict(params), code[name]] for name, params in good],
            "left_out": left_out,
            "lambdas": self.study.lambdas,
            "strategy": self.strategy,
        }

    def run(self, folder: Path, store: Store) -> Result:
        good, left_out = self.methods(store)
        places = [store.place(model) for model in self.models]
        recipe = SearchRecipe.of(
            base=self.study.base,
            models=[
                {"path": str(p), "data": m.data.spec}
                for p, m in zip(places, self.models, strict=True)
            ],
            methods=[{"method": name, **params} for name, params in good],
            scaling_coefs=self.study.lambdas,
            strategy=self.strategy,
            each_method=True,
            seed=self.seed,
            threads=1,
            device=self.study.device,
        )
        result = run_search(recipe, None, tasks=[model.judging() for model in self.models])
        asked = [{**asdict(m.data), "lr": m.lr, "steps": m.steps} for m in self.models]
        for key in ("candidates", "seconds", "versions"):
            del result[key]
        return result | {"left_out": left_out, "asked": asked}


def rows_of(result: Result) -> dict[str, Mapping[str, Any]]:
    """Rule -> its row in a search, the single-task models and the base first; the base's, lambda 0,
    where validation puts that above everything that the rule gives.
    """
    rows: dict[str, Mapping[str, Any]] = {row["rule"]: row for row in result["rows"]}
    base = rows[UNMERGED]
    worse: dict[str, Mapping[str, Any]] = {
        name: {**base, "rule": name}
        for name, row in rows.items()
        if name not in (SINGLE, UNMERGED) and row["val"] < base["val"]
    }
    return rows | worse


def normalised(row: Mapping[str, Any]) -> float:
    """A row's normalised test score; NaN where a task's own model is right on no test example."""
    return math.nan if row["normalized"] is None else row["normalized"]


def notes(results: Sequence[Result]) -> list[str]:
    """What some models cannot be merged by, and why."""
    return sorted({f"{name}: {why}" for r in results for name, why in r["left_out"].items()})
