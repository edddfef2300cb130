"""What negation and analogy share: a working model that deltas are added to, judged on validation and tested once."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from deltafl.algebra.aggregate import Stepped
from deltafl.algebra.tensors import Tensors
from deltafl.checkpoints.checkpoint import open_tensors
from deltafl.experiments.studies.merging import Tuned
from deltafl.experiments.studies.study import Data, Study, Training
from deltafl.merge.task_vector import TaskVector
from deltafl.models import HeadRecipe, Net
from deltafl.tasks import ImageTask
from deltafl.tasks.task import Split
from deltafl.training.step import scores


@dataclass(frozen=True)
class Trial:
    """The base model of a study, and one that other weights are loaded into."""

    study: Study
    seed: int
    base: Tensors
    working: Net
    seen: dict[Data, tuple[ImageTask, Path]] = field(default_factory=dict)

    @classmethod
    def of(cls, study: Study, seed: int) -> "Trial":
        """Of one seed, on the study's device."""
        return cls(study, seed, open_tensors(study.base), study.net().copy_to(study.device))

    def delta(self, data: Data, training: Training) -> TaskVector:
        """The task vector of a fine-tune, in memory."""
        lazy = TaskVector.from_checkpoints(
            self.study.base, self.study.model(data, training, self.seed)
        )
        return TaskVector(dict(lazy.tensors))

    def accuracy(
        self, delta: TaskVector | None, coefficient: float, data: Data, split: Split
    ) -> float:
        """Of base + coefficient * delta on "val" or "test" of a task."""
        tensors = (
            self.base
            if delta is None or not coefficient
            else Stepped(self.base, delta.tensors, coefficient)
        )
        self.working.load(tensors)
        if data not in self.seen:
            self.seen[data] = (
                self.study.judged(data, self.seed),
                self.study.head(data, self.seed),
            )
        task, head = self.seen[data]
        self.working.prepare(task, HeadRecipe(head=str(head)))
        return scores(self.working, task, split).double().mean().item()


def random_like(delta: TaskVector, generator: torch.Generator) -> TaskVector:
    """A Gaussian direction with the norm of `delta` in every tensor (the control of arXiv 2212.04089, section 3)."""
    drawn = {}
    for name, tensor in delta.tensors.items():
        noise = torch.randn(tensor.shape, generator=generator)
        length = noise.double().norm()
        drawn[name] = noise * float(tensor.double().norm() / length) if length else noise
    return TaskVector(drawn)


def told(study: Study, model: Tuned, others: Sequence[Data]) -> dict[str, Any]:
    """What decides a trial of a fine-tune that other tasks judge or take part in, as JSON values."""
    data = [model.data, *others]
    return {
        "model": study.model(model.data, model.training, model.seed).name,
        "seed": model.seed,
        "data": [asdict(one) for one in data],
        "judging": [study.judging(one, model.seed) for one in data],
        "lambdas": study.lambdas,
    }
