"""Task arithmetic beyond addition (arXiv 2212.04089): forget a task, and complete an analogy."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch

from deltafl.algebra.aggregate import Stepped
from deltafl.checkpoints.checkpoint import open_tensors
from deltafl.errors import DeltaflError
from deltafl.experiments.statistics import by_seed, summary
from deltafl.experiments.study import Data, FineTune, Study, base_net
from deltafl.experiments.sweep import Cell, Result, Store, Sweep, Work
from deltafl.merge.task_vector import TaskVector
from deltafl.models import HeadRecipe, Net
from deltafl.seeding import keyed_generator
from deltafl.tasks.task import Split
from deltafl.training.step import scores

KEPT = 0.95
"""The share of the base's control score that must remain."""

FORGOTTEN = ("base", "fine-tuned", "negated task vector", "random vector")
COMPLETED = (
    "base",
    "B: same classes, other domain",
    "C: same domain, other classes",
    "C + (B - A)",
    "fine-tuned on D",
)


@dataclass(frozen=True)
class Bench:
    """The base model of a study with task vectors added to it, judged on tasks with their heads."""

    store: Store
    study: Study
    seed: int
    nets: dict[Data, Net] = field(default_factory=dict)

    def delta(self, model: FineTune) -> TaskVector:
        """The task vector of a fine-tune, in memory."""
        lazy = TaskVector.from_checkpoints(self.study.base, self.store.place(model))
        return TaskVector(dict(lazy.tensors))

    def score(self, delta: TaskVector | None, scale: float, data: Data, split: Split) -> float:
        """Mean score of base + scale * delta on a split of a task."""
        task = self.study.judged(data, self.seed)
        if data not in self.nets:
            model = self.study.tuned(data, self.seed)
            self.nets[data] = base_net(self.study.base).copy_to(self.study.device)
            self.nets[data].prepare(task, HeadRecipe.of(head=model.recipe(self.store).head.head))
        base = open_tensors(self.study.base)
        self.nets[data].load(base if delta is None else Stepped(base, delta.tensors, scale))
        return scores(self.nets[data], task, split).double().mean().item()


@dataclass(frozen=True)
class Trial(Work):
    """A fine-tune of which others take part: they are its `others`, or the tasks that judge it."""

    model: FineTune
    others: tuple[FineTune, ...]

    @property
    def study(self) -> Study:
        return self.model.study

    def content(self, store: Store) -> Mapping[str, Any]:
        models = (self.model, *self.others)
        return {
            "models": [model.content(store) for model in models],
            "judging": [model.judging().fingerprint() for model in models],
            "lambdas": self.study.lambdas,
        }


@dataclass(frozen=True)
class Negation(Trial):
    """Of one target, whose only other is the control task: way -> test scores on both, and lambda.

    lambda makes the validation score on the target least, among those that keep `KEPT` of the base's
    validation score on the control task; lambda = 0 is one. Beside it a random vector of the same
    norm in every tensor.
    """

    kind: ClassVar[str] = "negations"

    def needs(self) -> Sequence[Work]:
        return (self.model, self.others[0].head)

    def run(self, folder: Path, store: Store) -> Result:
        bench, seed = Bench(store, self.study, self.model.seed), self.model.seed
        target, control = self.model.data, self.others[0].data
        delta = bench.delta(self.model)
        noise = random_like(delta, keyed_generator(seed, "random vector", target.spec))
        floor = KEPT * bench.score(None, 0, control, "val")

        def least(vector: TaskVector) -> float:
            """The coefficient of -vector."""
            best, chosen = bench.score(None, 0, target, "val"), 0.0
            for value in self.study.lambdas:
                if bench.score(vector, -value, control, "val") >= floor:
                    score = bench.score(vector, -value, target, "val")
                    best, chosen = min((best, chosen), (score, value), key=lambda pair: pair[0])
            return chosen

        settings = ((None, 0.0), (delta, 1.0), (delta, -least(delta)), (noise, -least(noise)))
        found = {
            way: {
                "target": bench.score(vector, value, target, "test"),
                "control": bench.score(vector, value, control, "test"),
                "scaling_coef": abs(value),
            }
            for way, (vector, value) in zip(FORGOTTEN, settings, strict=True)
        }
        return {"task": self.model.task.name, **found}


@dataclass(frozen=True)
class Analogy(Trial):
    """Of one D, whose others are A, B and C: way -> test score on D and lambda, which is chosen for
    each way on validation data of D, and is 1 for the model that was trained on D.
    """

    kind: ClassVar[str] = "analogies"

    def needs(self) -> Sequence[Work]:
        return (self.model, *self.others)

    def run(self, folder: Path, store: Store) -> Result:
        bench, d = Bench(store, self.study, self.model.seed), self.model.data
        a, b, c = map(bench.delta, self.others)

        def best(vector: TaskVector) -> float:
            lambdas = (0.0, *self.study.lambdas)
            return max(lambdas, key=lambda value: bench.score(vector, value, d, "val"))

        vectors = (b, c, c + (b - a))
        settings = [(None, 0.0), *((v, best(v)) for v in vectors), (bench.delta(self.model), 1.0)]
        found = {
            way: {"test": bench.score(vector, value, d, "test"), "scaling_coef": value}
            for way, (vector, value) in zip(COMPLETED, settings, strict=True)
        }
        return {"task": self.model.task.name, **found}


def random_like(delta: TaskVector, generator: torch.Generator) -> TaskVector:
    """A Gaussian direction with the norm of `delta` in every tensor (the control of arXiv 2212.04089,
    section 3).
    """
    drawn = {}
    for name, tensor in delta.tensors.items():
        noise = torch.randn(tensor.shape, generator=generator)
        length = noise.double().norm()
        drawn[name] = noise * float(tensor.double().norm() / length) if length else noise
    return TaskVector(drawn)


def negation(study: Study, sweep: Sweep) -> list[Cell]:
    """Every task but the control is forgotten. Raises DeltaflError if there is none."""
    targets = [spec for spec in study.tasks if spec != study.control]
    if not targets:
        raise DeltaflError(
            "negation: no task to forget; name one in --tasks that is not the --control"
        )
    return [
        Cell(
            {"task": spec},
            Negation(study.tuned(Data(spec), seed), (study.tuned(Data(study.control), seed),)),
        )
        for seed in study.seeds
        for spec in targets
    ]


def negation_rows(study: Study, cells: Sequence[Cell], results: Sequence[Result]) -> dict[str, Any]:
    """Score on the target and on the control task of base - lambda delta, mean over targets."""
    points, rows = _points(FORGOTTEN, cells, results), []
    for way in FORGOTTEN:
        group = [point for point in points if point["way"] == way]
        control = summary(by_seed(group, "control"))
        rows.append(
            {
                "way": way,
                **asdict(summary(by_seed(group, "target"))),
                "control": control.mean,
                "control_spread": control.spread,
                "scaling_coef": summary(by_seed(group, "scaling_coef")).mean,
            }
        )
    control = study.task(Data(study.control), study.seeds[0]).name
    return {"rows": rows, "points": points, "control": control, "notes": []}


def analogy(study: Study, sweep: Sweep) -> list[Cell]:
    """A is to B as C is to D: D = (domain, half of the classes), for every domain and half. A: the other
    domain and half, B: the other domain, C: the other half; all have the head of the first domain.
    """
    cells = []
    for seed in study.seeds:
        for i in range(4):
            (domain, other), half = study.domains[:: 1 if i < 2 else -1], i % 2
            places = ((other, 1 - half), (other, half), (domain, 1 - half), (domain, half))
            a, b, c, d = (
                study.tuned(Data(spec, part, 2, head=study.domains[0]), seed)
                for spec, part in places
            )
            cells.append(Cell({"domain": domain, "half": half}, Analogy(d, (a, b, c))))
    return cells


def analogy_rows(study: Study, cells: Sequence[Cell], results: Sequence[Result]) -> dict[str, Any]:
    """Score on D of base + lambda (C + B - A), mean over both domains and halves."""
    points, rows = _points(COMPLETED, cells, results), []
    for way in COMPLETED:
        group = [point for point in points if point["way"] == way]
        coefficient = summary(by_seed(group, "scaling_coef")).mean
        score = asdict(summary(by_seed(group, "test")))
        rows.append({"way": way, **score, "scaling_coef": None if way == "base" else coefficient})
    return {"rows": rows, "points": points, "notes": []}


def _points(
    ways: Sequence[str], cells: Sequence[Cell], results: Sequence[Result]
) -> list[dict[str, Any]]:
    return [
        {"task": found["task"], "seed": cell.work.model.seed, "way": way, **found[way]}
        for cell, found in zip(cells, results, strict=True)
        if isinstance(cell.work, Trial)
        for way in ways
    ]
