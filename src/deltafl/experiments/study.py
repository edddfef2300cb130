"""What one-shot studies share: tasks and their parts, heads and fine-tunes."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import ClassVar, TypeAlias

import numpy as np
import torch
from torch import Tensor

from deltafl.algebra.tensors import device_named
from deltafl.errors import DeltaflError, attempt
from deltafl.experiments.recipe import StudyRecipe
from deltafl.experiments.sweep import Result, Store, Work
from deltafl.federated import FederatedRecipe
from deltafl.files import atomic_folder
from deltafl.models import HEAD_FILE, HeadFit, HeadRecipe, Net, load_net
from deltafl.seeding import keyed_generator
from deltafl.tasks import ImageInput, ImageTask, Task, TextInput, load_task
from deltafl.tasks.selection import stratified
from deltafl.tasks.task import SPLITS, hash_of
from deltafl.training import TrainingRecipe, finetune

Inputs: TypeAlias = ImageInput | TextInput


@dataclass(frozen=True)
class Data:
    """A data set by its spec, or one of `parts` groups of its classes, dealt by the seed. score:
    what it is judged by (see `TextSource`).
    """

    spec: str
    part: int = 0
    parts: int = 1
    score: str | None = None


@dataclass(frozen=True, eq=False)
class Study:
    """What all works of the studies of one command and seed share.

    base: the folder of the base model. inputs: what that takes. training: of every fine-tune, whose
    lr and steps the works choose; its seed is that of everything.
    """

    base: str
    inputs: Inputs
    recipe: StudyRecipe
    training: TrainingRecipe

    @property
    def seed(self) -> int:
        """Of this study."""
        return self.training.seed

    @property
    def device(self) -> str:
        """Where models are fitted and judged."""
        return str(device_named(self.training.device))

    def tuned(self, data: Data, lr: float = 0, steps: int = 0, head: str = "") -> "FineTune":
        """A fine-tune, with the training of studies that need only one where nothing is said: the
        second of several lr, the most steps. head: the data set that its head is made from, if not
        its own.
        """
        lrs = self.recipe.lr_values
        lr, steps = lr or lrs[min(1, len(lrs) - 1)], steps or max(self.recipe.steps_values)
        return FineTune(self, data, lr, steps, FrozenHead(self, head or data.spec))

    def check(self, names: Iterable[str]) -> None:
        """Raise DeltaflError with what is wrong with the data of these studies: they are not there,
        have one name, or other classes than they should.
        """
        recipe, tasks, problems = self.recipe, dict[str, Task](), list[str]()
        own = {"negation": [recipe.kept], "data-heterogeneity": [recipe.dealt]}
        own["analogy"] = [*recipe.domains]
        if "language" in names:
            for spec, score in recipe.written.items():
                attempt(problems, task_of, self, Data(spec, score=score))
        for spec in dict.fromkeys([*recipe.tasks, *chain(*(own.get(name, ()) for name in names))]):
            if task := attempt(problems, task_of, self, Data(spec)):
                tasks[spec] = task
        named = [(tasks[spec].name, spec) for spec in recipe.tasks if spec in tasks]
        for name in dict(named):
            same = [spec for other, spec in named if other == name]
            if len(same) > 1:
                problems.append(f'--tasks: {", ".join(same)} are all called "{name}"')
        domains = [tasks[spec] for spec in recipe.domains if spec in tasks]
        if len({task.class_names for task in domains if isinstance(task, ImageTask)}) > 1:
            both = " and ".join(recipe.domains)
            problems.append(
                f"analogy: {both} have other classes; give --domains with the same ones"
            )
        if problems:
            raise DeltaflError(*dict.fromkeys(problems))


@lru_cache(maxsize=16)
def task_of(study: Study, data: Data) -> Task:
    """A task with the validation split of the study's seed: what models and heads are made from."""
    if data.parts == 1:
        own = {"data": data.spec} | ({"score": data.score} if data.score else {})
        recipe = study.training.data.replace(**own)
        return load_task(recipe, study.inputs, study.seed)
    whole = task_of(study, Data(data.spec))
    generator = keyed_generator(study.seed, "classes", data.parts)
    order = torch.randperm(int(whole.groups("train").max()) + 1, generator=generator)
    group = order.tensor_split(data.parts)[data.part]
    rows = {split: torch.isin(whole.groups(split), group).nonzero().flatten() for split in SPLITS}
    return whole.only(rows, f"{whole.name}_{data.part + 1}of{data.parts}")


def judged(study: Study, data: Data) -> Task:
    """The task with no more validation and test examples than merges are judged on."""
    task, rows = task_of(study, data), dict[str, Tensor]()
    recipe = study.recipe
    limits = (None, recipe.val_limit, recipe.written_limit if data.score else recipe.test_limit)
    for split, limit in zip(SPLITS, limits, strict=True):
        groups = task.groups(split).numpy()
        most = limit or len(groups)
        rng = np.random.default_rng([study.seed, most])
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


def settings_of(recipe: TrainingRecipe | FederatedRecipe) -> Mapping[str, object]:
    """What decides a training beside model and data, which count by what they hold."""
    content = {k: v for k, v in recipe.content().items() if k not in ("model", "data")}
    return content | recipe.data.model_dump(include={"augment", "label_smoothing"})


@dataclass(frozen=True)
class FrozenHead(Work):
    """The frozen head of a data set, made from the base model; parts of it share it."""

    study: Study
    spec: str
    kind: ClassVar[str] = "heads"

    @property
    def task(self) -> Task:
        """What it is fitted on."""
        return task_of(self.study, Data(self.spec))

    def recipe(self, store: Store) -> HeadRecipe:
        """It as it is kept; of a language model none."""
        if not base_net(self.study.base).takes_head:
            return HeadRecipe.of()
        return HeadRecipe.of(head=str(store.place(self) / HEAD_FILE))

    def content(self) -> Mapping[str, object]:
        return {
            "base": base_hash(self.study.base),
            "task": self.task.fingerprint(),
            "head": self.study.training.head.content(),
            "seed": self.study.seed,
        }

    def title(self) -> str:
        return self.task.name

    def run(self, folder: Path, store: Store) -> Result:
        net = base_net(self.study.base).copy_to(self.study.device)
        net.prepare(self.task, self.study.training.head, HeadFit(self.study.seed))
        with atomic_folder(folder, overwrite=True) as scratch:
            net.save_head(scratch)
        return {}


@dataclass(frozen=True)
class FineTune(Work):
    """The base model fine-tuned on a task with a frozen head; no validation chooses, the one at the
    end is told.
    """

    study: Study
    data: Data
    lr: float
    steps: int
    head: FrozenHead
    kind: ClassVar[str] = "fine-tunes"

    @property
    def task(self) -> Task:
        """What it is trained on."""
        return task_of(self.study, self.data)

    def needs(self) -> Iterable[Work]:
        return (self.head,)

    def content(self) -> Mapping[str, object]:
        return {
            "head": self.head,
            "task": self.task.fingerprint(),
            "training": settings_of(self.recipe),
        }

    @property
    def recipe(self) -> TrainingRecipe:
        """How it is trained, but for its head."""
        own = {"data": self.data.spec, "lr": self.lr, "steps": self.steps}
        return self.study.training.replace(**own, overwrite=True)

    def title(self) -> str:
        return f"{self.task.name}-lr{self.lr:g}-steps{self.steps}-seed{self.study.seed}"

    def run(self, folder: Path, store: Store) -> Result:
        own = self.head.recipe(store).model_dump()
        recipe, net = self.recipe.replace(out=str(folder), **own), base_net(self.study.base)
        task = judged(self.study, self.data)
        return finetune(net, task, recipe, resume=True).training
