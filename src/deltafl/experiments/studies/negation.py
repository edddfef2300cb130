"""Forgetting a task by subtracting its task vector (arXiv 2212.04089, section 3)."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from deltafl.errors import DeltaflError
from deltafl.experiments.studies.merging import Tuned, Work
from deltafl.experiments.studies.statistics import by_seed, summary
from deltafl.experiments.studies.study import Data, Study
from deltafl.experiments.studies.trials import Trial, random_like, told
from deltafl.merge.task_vector import TaskVector
from deltafl.seeding import keyed_generator

KEPT = 0.95
"""The share of the base's control accuracy that must remain."""

WAYS = ("base", "fine-tuned", "negated task vector", "random vector")


def negation(study: Study, work: Work) -> dict[str, Any]:
    """Accuracy on the target and on the control task of base - lambda delta, mean over targets.

    lambda makes validation accuracy on the target least, among those that keep `KEPT` of the base's validation
    accuracy on the control task; lambda = 0 is one. Beside it a random vector of the same norm in every tensor.

    Raises:
        DeltaflError: no task but the control task.
    """
    targets = [spec for spec in study.tasks if spec != study.control]
    if not targets:
        raise DeltaflError(
            "negation: no task to forget; name one in --tasks that is not the --control"
        )
    asked = [Tuned(Data(spec), study.training, seed) for seed in study.seeds for spec in targets]
    work.fine_tune(asked)
    found = work.each("negate", negated, asked)
    points = [
        {"task": one["task"], "seed": model.seed, "way": way, **one[way]}
        for model, one in zip(asked, found, strict=True)
        for way in WAYS
    ]
    rows = [_row(way, [point for point in points if point["way"] == way]) for way in WAYS]
    control = study.task(Data(study.control), study.recipe.seed).name
    return {"rows": rows, "points": points, "control": control, "notes": []}


def _row(way: str, points: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    control = summary(by_seed(points, "control"))
    return {
        "way": way,
        **asdict(summary(by_seed(points, "target"))),
        "control": control.mean,
        "control_spread": control.spread,
        "scaling_coef": summary(by_seed(points, "scaling_coef")).mean,
    }


def negated(study: Study, model: Tuned) -> dict[str, Any]:
    """Of one target and seed: way -> test accuracies on target and control, and the coefficient; kept on disk."""
    return study.kept(
        "negations", told(study, model, [Data(study.control)]), lambda: _negated(study, model)
    )


def _negated(study: Study, model: Tuned) -> dict[str, Any]:
    trial = Trial.of(study, model.seed)
    target, control = model.data, Data(study.control)
    delta = trial.delta(target, model.training)
    noise = random_like(delta, keyed_generator(model.seed, "random vector", target.spec))
    floor = KEPT * trial.accuracy(None, 0, control, "val")

    def least(vector: TaskVector) -> float:
        """The coefficient of -vector."""
        best, chosen = trial.accuracy(None, 0, target, "val"), 0.0
        for value in study.lambdas:
            if trial.accuracy(vector, -value, control, "val") < floor:
                continue
            score = trial.accuracy(vector, -value, target, "val")
            if score < best:
                best, chosen = score, value
        return chosen

    settings = {
        WAYS[0]: (None, 0.0),
        WAYS[1]: (delta, 1.0),
        WAYS[2]: (delta, -least(delta)),
        WAYS[3]: (noise, -least(noise)),
    }
    return {
        "task": study.task(target, model.seed).name,
        **{
            way: {
                "target": trial.accuracy(vector, value, target, "test"),
                "control": trial.accuracy(vector, value, control, "test"),
                "scaling_coef": abs(value),
            }
            for way, (vector, value) in settings.items()
        },
    }
