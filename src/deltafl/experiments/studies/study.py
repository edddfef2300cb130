"""What a one-shot study is made of: its settings, and the models, heads and data that its merges share."""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from deltafl.checkpoints.layout import file_hash, fingerprint, read_layout
from deltafl.errors import DeltaflError
from deltafl.files import atomic_folder, write_atomically
from deltafl.models import LoadedEncoder, load_encoder, save_encoder
from deltafl.models.flat import FlatModel
from deltafl.models.heads import LinearHead, load_head, save_head
from deltafl.seeding import keyed_generator
from deltafl.tasks.arrays import Split, Task, arrays_of, image_task, load_arrays
from deltafl.tasks.classes import class_groups, only_classes
from deltafl.tasks.selection import stratified
from deltafl.training import FinetuneRecipe, finetune
from deltafl.training.evaluation import make_head
from deltafl.training.finetune import TRAINING_JSON
from deltafl.training.state import run_config, sha256_of


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
    recipe: FinetuneRecipe
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

    def encoder(self) -> LoadedEncoder:
        """The base model, read once in each process. Not to be changed."""
        return _encoder(self.base)

    def task(self, data: Data, seed: int) -> Task:
        """A task with the validation split of a seed: what models and heads are made from."""
        whole = _task(data.spec, self.base, seed, self.limit, self.data_dir)
        if data.parts == 1:
            return whole
        groups = class_groups(
            len(whole.class_names), data.parts, keyed_generator(seed, "classes", data.parts)
        )
        name = f"{whole.name}_{data.part + 1}of{data.parts}"
        return arrays_of(only_classes(image_task(whole), groups[data.part], name))

    def judged(self, data: Data, seed: int) -> Task:
        """The task with no more validation and test examples than merges are judged on."""
        task = self.task(data, seed)
        return replace(
            task,
            val=_some(task.val, self.val_limit, seed),
            test=_some(task.test, self.test_limit, seed),
        )

    def head(self, data: Data, seed: int) -> Path:
        """The file of the frozen head of a data set, made from the base model where there is none yet.

        Parts of a data set share the head of the whole.
        """
        task = self.task(Data(data.head or data.spec), seed)
        recipe = replace(self.recipe, seed=seed, steps=0)
        config = run_config(self.encoder(), task, recipe, None)
        named = [
            Path(ref) for ref in (recipe.head, recipe.templates) if ref and Path(ref).is_file()
        ]
        key = content_key(config | {"files": [file_hash([file]) for file in named]})
        file = self.folder / "heads" / f"{task.name}-{key}.safetensors"
        if not file.is_file():
            write_head(
                make_head(FlatModel(self.encoder().copy_to(self.device)), task, recipe), file
            )
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
        task = self.judged(data, seed)
        parts = [t for split in (task.val, task.test) for t in (split.labels, split.images)]
        return [file_hash([self.head(data, seed)]), sha256_of(*parts)]

    def model(self, data: Data, training: Training, seed: int) -> Path:
        """The folder of a fine-tune, made where there is none yet."""
        task = self.task(data, seed)
        head = load_head(self.head(data, seed))
        recipe = replace(self.recipe, lr=training.lr, steps=training.steps, seed=seed)
        key = content_key(run_config(self.encoder(), task, recipe, head))
        out = (
            self.folder
            / "models"
            / f"{task.name}-lr{training.lr:g}-steps{training.steps}-seed{seed}-{key}"
        )
        if not (out / TRAINING_JSON).is_file():
            finetune(
                self.encoder(),
                task,
                recipe,
                out,
                head=head,
                resume=True,
                overwrite=True,
                device=self.device,
            )
        return out


def save_base(encoder: LoadedEncoder, folder: Path) -> None:
    """Write the base model, as merges read it; training.json beside it says where it came from.

    Raises:
        DeltaflError: another model is there.
    """
    if not folder.exists():
        with atomic_folder(folder) as scratch:
            _write_base(encoder, scratch)
        return
    with TemporaryDirectory() as scratch:
        _write_base(encoder, Path(scratch))
        same = fingerprint(read_layout(str(folder))) == fingerprint(read_layout(scratch))
    if not same:
        raise DeltaflError(
            f'"{folder}" is another model than "{encoder.origin}"; choose another --out, or --overwrite'
        )


def _write_base(encoder: LoadedEncoder, folder: Path) -> None:
    save_encoder(encoder, folder)
    (folder / TRAINING_JSON).write_text(json.dumps({"base": {"id": encoder.origin}}))


def content_key(config: Mapping[str, Any]) -> str:
    """16 hexadecimal digits that another configuration does not have."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:16]


def write_head(head: LinearHead, file: Path) -> None:
    """A head's file, whole or absent."""
    file.parent.mkdir(parents=True, exist_ok=True)
    scratch = file.with_suffix(f".{os.getpid()}.tmp")
    save_head(head, scratch)
    write_atomically(file, scratch.read_bytes())
    scratch.unlink()


@lru_cache(maxsize=2)
def _encoder(base: str) -> LoadedEncoder:
    return load_encoder(base)


@lru_cache(maxsize=16)
def _task(spec: str, base: str, seed: int, limit: int | None, data_dir: str | None) -> Task:
    given = _encoder(base).input
    size, channels = given.image_size, given.channels
    return load_arrays(
        spec, image_size=size, channels=channels, seed=seed, limit=limit, data_dir=data_dir
    )


def _some(split: Split, most: int | None, seed: int) -> Split:
    """A stratified choice of at most `most` examples."""
    if most is None:
        return split
    rows = stratified(split.labels.numpy(), most, np.random.default_rng([seed, most]))
    return Split(split.images[rows], split.labels[rows])
