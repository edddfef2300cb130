"""What negation and analogy share: a working model that deltas are added to, judged on validation and tested once."""

from dataclasses import dataclass

import torch

from deltafl.aggregation import Stepped
from deltafl.checkpoint import open_tensors
from deltafl.datasets.task import Split
from deltafl.experiments.studies.study import Data, Study, Training
from deltafl.models.flat import FlatModel
from deltafl.models.heads import LinearHead, load_head
from deltafl.taskvector import TaskVector
from deltafl.tensors import Tensors
from deltafl.training import predict_correct


@dataclass(frozen=True)
class Trial:
    """The base model of a study, and one that other weights are loaded into."""

    study: Study
    seed: int
    base: Tensors
    working: FlatModel

    @classmethod
    def of(cls, study: Study, seed: int) -> "Trial":
        """Of one seed, on the study's device."""
        return cls(study, seed, open_tensors(study.base), FlatModel(study.encoder().copy_to(study.device or "cpu")))

    def delta(self, data: Data, training: Training) -> TaskVector:
        """The task vector of a fine-tune, in memory."""
        lazy = TaskVector.from_checkpoints(self.study.base, self.study.model(data, training, self.seed))
        return TaskVector(dict(lazy.tensors))

    def accuracy(self, delta: TaskVector | None, coefficient: float, data: Data, split: str) -> float:
        """Of base + coefficient * delta on "val" or "test" of a task."""
        tensors = self.base if delta is None or not coefficient else Stepped(self.base, delta.tensors, coefficient)
        self.working.load(tensors)
        return mean_correct(self.working, self.head(data), getattr(self.study.judged(data, self.seed), split))

    def head(self, data: Data) -> LinearHead:
        """The frozen head of a task."""
        return load_head(self.study.head(data, self.seed))


def mean_correct(model: FlatModel, head: LinearHead, split: Split) -> float:
    """Accuracy."""
    return predict_correct(model, head.to(model.device), split).double().mean().item()


def random_like(delta: TaskVector, generator: torch.Generator) -> TaskVector:
    """A Gaussian direction with the norm of `delta` in every tensor (the control of arXiv 2212.04089, section 3)."""
    drawn = {}
    for name, tensor in delta.tensors.items():
        noise = torch.randn(tensor.shape, generator=generator)
        length = noise.double().norm()
        drawn[name] = noise * float(tensor.double().norm() / length) if length else noise
    return TaskVector(drawn)
