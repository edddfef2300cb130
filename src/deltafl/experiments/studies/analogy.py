"""A model for data that nobody trained on: A is to B as C is to D (arXiv 2212.04089, section 5)."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from deltafl.experiments.studies.merging import Tuned, Work
from deltafl.experiments.studies.statistics import by_seed, summary
from deltafl.experiments.studies.study import Data, Study
from deltafl.experiments.studies.trials import Trial, told
from deltafl.merge.task_vector import TaskVector

WAYS = (
    "base",
    "B: same classes, other domain",
    "C: same domain, other classes",
    "C + (B - A)",
    "fine-tuned on D",
)


def analogy(study: Study, work: Work) -> dict[str, Any]:
    """Accuracy on D = (domain, half of the classes), for every domain and half, of base + lambda (C + B - A).

    A: the other domain and half, B: the other domain, C: the other half; all share one head. lambda is chosen for
    each row on validation data of D, and is 1 for the model that was trained on D.
    """
    asked = [
        Tuned(_half(study, domain, half), study.training, seed)
        for seed in study.seeds
        for domain in study.domains
        for half in range(2)
    ]
    work.fine_tune(asked)
    found = work.each("analogy", completed, asked)
    points = [
        {"task": study.task(m.data, m.seed).name, "seed": m.seed, "way": way, **one[way]}
        for m, one in zip(asked, found, strict=True)
        for way in WAYS
    ]
    rows = []
    for way in WAYS:
        own = [point for point in points if point["way"] == way]
        coefficient = summary(by_seed(own, "scaling_coef")).mean
        score = asdict(summary(by_seed(own, "test")))
        rows.append({"way": way, **score, "scaling_coef": None if way == WAYS[0] else coefficient})
    return {"rows": rows, "points": points, "notes": []}


def completed(study: Study, d: Tuned) -> dict[str, Any]:
    """Of one D and seed: way -> test accuracy and coefficient; kept on disk."""
    other = next(spec for spec in study.domains if spec != d.data.spec)
    places = ((other, 1 - d.data.part), (other, d.data.part), (d.data.spec, 1 - d.data.part))
    others = [_half(study, spec, half) for spec, half in places]
    return study.kept("analogies", told(study, d, others), lambda: _completed(study, d, others))


def _half(study: Study, spec: str, half: int) -> Data:
    """Half of the classes of a domain; all have the head of the first domain."""
    return Data(spec, half, 2, head=study.domains[0])


def _completed(study: Study, d: Tuned, others: Sequence[Data]) -> dict[str, Any]:
    trial = Trial.of(study, d.seed)
    a, b, c = (trial.delta(data, d.training) for data in others)

    def best(vector: TaskVector) -> float:
        return max(
            (0.0, *study.lambdas), key=lambda value: trial.accuracy(vector, value, d.data, "val")
        )

    combined = c + (b - a)
    settings = (
        (None, 0.0),
        (b, best(b)),
        (c, best(c)),
        (combined, best(combined)),
        (trial.delta(d.data, d.training), 1.0),
    )
    return {
        way: {"test": trial.accuracy(vector, value, d.data, "test"), "scaling_coef": value}
        for way, (vector, value) in zip(WAYS, settings, strict=True)
    }
