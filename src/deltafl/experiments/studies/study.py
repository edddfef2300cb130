"""What a one-shot study is made of: its settings, and the models, heads and data that its merges share."""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deltafl.checkpoints.layout import file_hash, fingerprint, read_layout
from deltafl.errors import DeltaflError
from deltafl.files import atomic_folder, write_atomically
from deltafl.models import Head, HeadFit, Net, load_net
from deltafl.models.fit import classifier_of
from deltafl.models.head import save_head
from deltafl.seeding import keyed_generator
from deltafl.tasks import DataRecipe, ImageTask, load_task
from deltafl.tasks.classes import class_groups, only_classes
from deltafl.tasks.selection import stratified
from deltafl.training import TRAINING_JSON, TrainingRecipe, finetune
from deltafl.training.state import run_config


@dataclass(frozen=True)
class Training:
    """What training heterogeneity is about: the learning rate and the number of steps of one fine-tune."""

    lr: float
    steps: int


@dataclass(frozen=True)
class Data:
    """A data set by its spec, or one of `parts` groups of its classes, dealt at random by the seed.

    head: the data set that its head is made from; None: itself, whole.
    """

    spec: str
    part: int = 0
    parts: int = 1
    head: str | None = None


@dataclass(frozen=True)
class Study:
    """The settings of all studies of one run of the command.

    base: the folder of the base model. folder: where models and searches are kept, each under the content of its
    configuration. recipe: of every fine-tune; lr and steps come from `lrs` and `steps`. draws: merges of one kind in
    training-heterogeneity, for each seed. methods: (name, parameters; a list is a grid). strategy: of each search; a
    race is one within each method. val_limit, test_limit: at most so many examples of each task that merges are judged
    on; limit: of each split, before that. control: the task that negation must not harm. domains: two data sets with
    the same classes, for the analogy. split: the data set that data-heterogeneity splits by class.
    """

    base: str
    folder: Path
    tasks: tuple[str, ...]
    recipe: TrainingRecipe
    lrs: tuple[float, ...]
    steps: tuple[int, ...]
    methods: tuple[tuple[str, Mapping[str, Any]], ...]
    lambdas: tuple[float, ...]
    control: str
    domains: tuple[str, ...]
    split: str
    draws: int = 4
    strategy: str = "racing"
    val_limit: int | None = None
    test_limit: int | None = None
    num_runs: int = 1
    limit: int | None = None
    data_dir: str | None = None
    device: str = "cpu"

    @property
    def training(self) -> Training:
        """That of studies which need one: the second learning rate of several, or the only one; the most steps."""
        return Training(self.lrs[min(1, len(self.lrs) - 1)], max(self.steps))

    @property
    def seeds(self) -> range:
        """One for each run."""
        return range(self.recipe.seed, self.recipe.seed + self.num_runs)

    def net(self) -> Net:
        """The base model, read once in each process. Not to be changed."""
        return _net(self.base)

    def training_of(self, data: str, seed: int, **settings: Any) -> TrainingRecipe:
        """The recipe of a fine-tune of the base."""
        return self.recipe.replace(
            data=data, data_dir=self.data_dir, limit=self.limit, seed=seed, **settings
        )

    def task(self, data: Data, seed: int) -> ImageTask:
        """A task with the validation split of a seed: what models and heads are made from."""
        whole = _task(self.training_of(data.spec, seed).data, self.base, seed)
        if data.parts == 1:
            return whole
        groups = class_groups(
            len(whole.class_names), data.parts, keyed_generator(seed, "classes", data.parts)
        )
        part = only_classes(whole, groups[data.part], f"{whole.name}_{data.part + 1}of{data.parts}")
        assert isinstance(part, ImageTask)
        return part

    def judged(self, data: Data, seed: int) -> ImageTask:
        """The task with no more validation and test examples than merges are judged on."""
        task = self.task(data, seed)
        rows = {
            "train": torch.arange(task.size("train")),
            "val": _some(task.groups("val"), self.val_limit, seed),
            "test": _some(task.groups("test"), self.test_limit, seed),
        }
        return task.only(rows, task.name)

    def head(self, data: Data, seed: int) -> Path:
        """The file of the frozen head of a data set, made from the base model where there is none yet.

        Parts of a data set share the head of the whole.
        """
        data = Data(data.head or data.spec)
        task = self.task(data, seed)
        recipe = self.training_of(data.spec, seed, steps=0)
        head = recipe.head
        named = [Path(ref) for ref in (head.head, head.templates) if ref and Path(ref).is_file()]
        config = run_config(self.net(), task, recipe) | {"model": ""}
        key = content_key(config | {"files": [file_hash([file]) for file in named]})
        file = self.folder / "heads" / f"{task.name}-{key}.safetensors"
        if not file.is_file():
            net = self.net().copy_to(self.device)
            net.prepare(task, head, HeadFit(seed, autocast=recipe.autocast))
            write_head(classifier_of(net).head, file)
        return file

    def kept(
        self, kind: str, config: Mapping[str, Any], make: Callable[[], dict[str, Any]]
    ) -> dict[str, Any]:
        """What `make` gives, from disk where it was made before with this configuration."""
        file = self.folder / kind / f"{content_key(config)}.json"
        if not file.is_file():
            write_atomically(file, json.dumps(make()).encode())
        return json.loads(file.read_text())

    def judging(self, data: Data, seed: int) -> list[Any]:
        """What decides how models are judged on a task, as JSON values: head and examples, by hash."""
        return [file_hash([self.head(data, seed)]), self.judged(data, seed).fingerprint()]

    def model(self, data: Data, training: Training, seed: int) -> Path:
        """The folder of a fine-tune, made where there is none yet."""
        task, head = self.task(data, seed), self.head(data, seed)
        how = {"head": str(head), "few_shot": None, "templates": None, "device": self.device}
        how |= {"lr": training.lr, "steps": training.steps, "overwrite": True}
        recipe = self.training_of(data.spec, seed, **how)
        config = run_config(self.net(), task, recipe)
        key = content_key(config | {"model": "", "head": file_hash([head])})
        name = f"{task.name}-lr{training.lr:g}-steps{training.steps}-seed{seed}-{key}"
        out = self.folder / "models" / name
        if not (out / TRAINING_JSON).is_file():
            finetune(self.net(), task, recipe.replace(out=str(out)), resume=True)
        return out


def save_base(net: Net, folder: Path) -> None:
    """Write the base model, as merges read it; training.json beside it says where it came from.

    Raises:
        DeltaflError: another model is there.
    """
    if not folder.exists():
        with atomic_folder(folder) as scratch:
            _write_base(net, scratch)
        return
    with TemporaryDirectory() as scratch:
        _write_base(net, Path(scratch))
        same = fingerprint(read_layout(str(folder))) == fingerprint(read_layout(scratch))
    if not same:
        raise DeltaflError(
            f'"{folder}" is another model than "{net.origin}"; choose another --out, or --overwrite'
        )


def _write_base(net: Net, folder: Path) -> None:
    net.save(folder)
    (folder / TRAINING_JSON).write_text(json.dumps({"base": {"id": net.origin}}))


def content_key(config: Mapping[str, Any]) -> str:
    """16 hexadecimal digits that another configuration does not have."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:16]


def write_head(head: Head | None, file: Path) -> None:
    """A head's file, whole or absent."""
    assert head is not None
    file.parent.mkdir(parents=True, exist_ok=True)
    scratch = file.with_suffix(f".{os.getpid()}.tmp")
    save_head(head, scratch)
    write_atomically(file, scratch.read_bytes())
    scratch.unlink()


@lru_cache(maxsize=2)
def _net(base: str) -> Net:
    return load_net(base)


@lru_cache(maxsize=16)
def _task(data: DataRecipe, base: str, seed: int) -> ImageTask:
    task = load_task(data, _net(base).inputs, seed)
    if not isinstance(task, ImageTask):
        raise DeltaflError(f'studies are of images, "{data.data}" holds none')
    return task


def _some(groups: Tensor, most: int | None, seed: int) -> Tensor:
    """Rows of a stratified choice of at most `most` examples."""
    if most is None:
        return torch.arange(len(groups))
    return torch.from_numpy(stratified(groups.numpy(), most, np.random.default_rng([seed, most])))
