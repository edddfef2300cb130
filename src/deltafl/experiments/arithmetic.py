"""Task arithmetic beyond addition (arXiv 2212.04089): forget a task, and complete an analogy."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import ClassVar

import pandas as pd
import torch

from deltafl.algebra.aggregate import Stepped
from deltafl.checkpoints.checkpoint import open_tensors
from deltafl.experiments.merges import Merging
from deltafl.experiments.study import Data, FineTune, Study, base_net, judged, task_of
from deltafl.experiments.sweep import Cell, Found, Result, Store, Sweep, Work, points_of, tabulate
from deltafl.merge.task_vector import TaskVector
from deltafl.models import Net
from deltafl.seeding import keyed_generator
from deltafl.tasks.task import Split
from deltafl.training.step import scores

KEPT = 0.95
"""The share of the base's control score that must remain."""


@dataclass(frozen=True)
class Bench:
    """The base model of a study with task vectors added, judged on the tasks of fine-tunes."""

    store: Store
    study: Study
    nets: dict[FineTune, Net] = field(default_factory=dict)

    def delta(self, model: FineTune) -> TaskVector:
        """The task vector of a fine-tune, in memory."""
        lazy = TaskVector.from_checkpoints(self.study.base, self.store.place(model))
        return TaskVector(dict(lazy.tensors))

    def score(self, delta: TaskVector, scale: float, on: FineTune, split: Split) -> float:
        """Mean score of base + scale * delta, with a fine-tune's head, on a split of its task."""
        task = judged(self.study, on.data)
        if on not in self.nets:
            self.nets[on] = base_net(self.study.base).copy_to(self.study.device)
            self.nets[on].prepare(task, on.head.recipe(self.store))
        self.nets[on].load(Stepped(open_tensors(self.study.base), delta.tensors, scale))
        return scores(self.nets[on], task, split).double().mean().item()

    def points(
        self, ways: Mapping[str, tuple[TaskVector, float]], **on: FineTune
    ) -> list[Mapping[str, object]]:
        """Of every way, a vector with its coefficient, the test scores on tasks of fine-tunes."""
        return [
            {
                "seed": self.study.seed,
                "way": way,
                "scaling_coef": abs(value),
                **{key: self.score(vector, value, model, "test") for key, model in on.items()},
            }
            for way, (vector, value) in ways.items()
        ]


@dataclass(frozen=True)
class Negation(Merging):
    """Of one model. Its points: way -> test scores on its task and on the control task, and lambda.

    lambda makes the validation score on the target least, among those that keep `KEPT` of the
    base's validation score on the control task; lambda = 0 is one. Beside it a random vector of the
    same norm in every tensor.
    """

    control: FineTune
    kind: ClassVar[str] = "negations"

    def needs(self) -> Iterable[Work]:
        return (*self.models, self.control.head)

    def run(self, folder: Path, store: Store) -> Result:
        bench, (target,), control = Bench(store, self.study), self.models, self.control
        delta = bench.delta(target)
        key = "random vector", target.data.spec
        noise = random_like(delta, keyed_generator(self.study.seed, *key))
        floor = KEPT * bench.score(delta, 0, control, "val")

        def least(vector: TaskVector) -> float:
            """The coefficient of vector."""
            lambdas = [-value for value in self.study.recipe.scaling_coefs]
            kept = [x for x in lambdas if bench.score(vector, x, control, "val") >= floor]
            return min((0.0, *kept), key=lambda x: bench.score(vector, x, target, "val"))

        ways = {
            "base": (delta, 0.0),
            "fine-tuned": (delta, 1.0),
            "negated task vector": (delta, least(delta)),
            "random vector": (noise, least(noise)),
        }
        points = bench.points(ways, target=target, control=control)
        return {"points": points, "control": control.task.name}


@dataclass(frozen=True)
class Analogy(Merging):
    """Of A, B, C and D. Its points: way -> test score on D and lambda, which is chosen for each way
    on validation data of D, and is 1 for the model that was trained on D.
    """

    kind: ClassVar[str] = "analogies"

    def run(self, folder: Path, store: Store) -> Result:
        bench, model = Bench(store, self.study), self.models[-1]
        a, b, c, d = map(bench.delta, self.models)

        def best(vector: TaskVector) -> tuple[TaskVector, float]:
            """The vector with its coefficient."""
            lambdas = (0.0, *self.study.recipe.scaling_coefs)
            return vector, max(lambdas, key=lambda x: bench.score(vector, x, model, "val"))

        ways = {
            "base": (d, 0.0),
            "B: same classes, other domain": best(b),
            "C: same domain, other classes": best(c),
            "C + (B - A)": best(c + (b - a)),
            "fine-tuned on D": (d, 1.0),
        }
        return {"points": bench.points(ways, test=model)}


def random_like(delta: TaskVector, generator: torch.Generator) -> TaskVector:
    """A Gaussian direction with the norm of `delta` in every tensor (the control of arXiv
    2212.04089, section 3).
    """
    drawn = {}
    for name, tensor in delta.tensors.items():
        noise = torch.randn(tensor.shape, generator=generator)
        length = noise.double().norm()
        drawn[name] = noise * float(tensor.double().norm() / length) if length else noise
    return TaskVector(drawn)


def negation(study: Study, sweep: Sweep) -> list[Cell]:
    """Every task but the control is forgotten."""
    targets = [Data(spec) for spec in study.recipe.tasks if spec != study.recipe.kept]
    control = study.tuned(Data(study.recipe.kept))
    return [
        Cell({"task": task_of(study, data).name}, Negation((study.tuned(data),), control))
        for data in targets
    ]


def negation_rows(found: Found) -> Result:
    """Score on the target and on the control task of base - lambda delta, mean over targets."""
    rows = tabulate(by_seed(found), ["way"], "target", "control", "scaling_coef")
    return {"rows": rows, "control": found[0][1]["control"]}


def by_seed(found: Found) -> pd.DataFrame:
    """The means of each way over the points of a seed."""
    groups = points_of(found).groupby(["way", "seed"], sort=False, as_index=False)
    return pd.DataFrame(groups.mean(numeric_only=True))


def analogy(study: Study, sweep: Sweep) -> list[Cell]:
    """A is to B as C is to D: D = (domain, half of the classes), for every domain and half. A: the
    other domain and half, B: the other domain, C: the other half; all have the head of the first
    domain.
    """
    first, second = study.recipe.domains
    cells = []
    for (domain, other), half in product(((first, second), (second, first)), (0, 1)):
        places = ((other, 1 - half), (other, half), (domain, 1 - half), (domain, half))
        models = tuple(study.tuned(Data(spec, part, 2), head=first) for spec, part in places)
        cells.append(Cell({"task": models[-1].task.name}, Analogy(models)))
    return cells


def analogy_rows(found: Found) -> Result:
    """Score on D of base + lambda (C + B - A), mean over both domains and halves."""
    return {"rows": tabulate(by_seed(found), ["way"], "test", "scaling_coef")}
