"""Do the rules help where the models were trained differently? Merges alike and not, in steps, in lr, in both."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch

from deltafl.errors import DeltaflError
from deltafl.experiments.one_shot import BASE, SINGLE
from deltafl.experiments.studies.merging import Merge, Tuned, Work, normalised, row_of, settled
from deltafl.experiments.studies.statistics import correlation, gained, summary
from deltafl.experiments.studies.study import Data, Study, Training
from deltafl.seeding import keyed_generator

KINDS = ("alike", "steps differ", "lr differs", "both differ")
REFERENCE = "task_arithmetic"
"""What gains are measured against."""


def training_heterogeneity(study: Study, work: Work) -> dict[str, Any]:
    """For every kind of draw and rule: normalised test accuracy, and the gain over task arithmetic on the same models.

    A draw gives every task one of len(lrs) x len(steps) trainings: all the same one, one of all with the lr of the
    draw, one of all with its steps, or any. The interval is Student's over all draws of all seeds; draws of one seed
    share models, so that it is a little too narrow.
    """
    asked = [
        (kind, merge)
        for seed in study.seeds
        for kind in KINDS
        for merge in draws(study, kind, seed)
    ]
    results = work.search([merge for _, merge in asked])
    points = [
        p
        for (kind, merge), result in zip(asked, results, strict=True)
        for p in measured(kind, merge, result)
    ]
    rules = [name for name, _ in study.methods]
    cells = [(kind, rule) for kind in KINDS for rule in (SINGLE, BASE, *rules)]
    return {
        "rows": [row for kind, rule in cells if (row := _row(kind, rule, points)) is not None],
        "points": [p for p in points if p["rule"] in rules],
        "relations": [
            relation for rule in rules if (relation := _relation(rule, points)) is not None
        ],
        "notes": sorted(
            {f"{name}: {why}" for result in results for name, why in result["left_out"].items()}
        ),
    }


def draws(study: Study, kind: str, seed: int) -> list[Merge]:
    """Different merges of one kind, as many as `study.draws` where there are so many; a function of the seed.

    Raises:
        DeltaflError: no such merge, because only one lr or one number of steps is given.
    """
    generator = keyed_generator(seed, "draws", kind)
    found: dict[Merge, None] = {}
    for _ in range(50 * study.draws):
        if len(found) == study.draws:
            break
        trainings = _drawn(study, kind, generator)
        wanted = {
            "alike": (1, 1),
            "steps differ": (1, 2),
            "lr differs": (2, 1),
            "both differ": (2, 2),
        }[kind]
        different = len({t.lr for t in trainings}), len({t.steps for t in trainings})
        if all(
            have == 1 if want == 1 else have > 1
            for have, want in zip(different, wanted, strict=True)
        ):
            models = (Tuned(Data(s), t, seed) for s, t in zip(study.tasks, trainings, strict=True))
            found[Merge(tuple(models))] = None
    if not found:
        raise DeltaflError(
            f'training-heterogeneity: no merge where "{kind}"; give at least two tasks, two of --lr-values and two of '
            "--steps-values"
        )
    return list(found)


def _drawn(study: Study, kind: str, generator: torch.Generator) -> list[Training]:
    def pick(values: Sequence[Any], differ: bool) -> list[Any]:
        count = len(study.tasks) if differ else 1
        ids = torch.randint(len(values), (count,), generator=generator).tolist()
        return [values[i] for i in ids] * (1 if differ else len(study.tasks))

    lrs = pick(study.lrs, kind in ("lr differs", "both differ"))
    steps = pick(study.steps, kind in ("steps differ", "both differ"))
    return [Training(lr, n) for lr, n in zip(lrs, steps, strict=True)]


def measured(kind: str, merge: Merge, result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One point for each row of a search: its score, its gain, and how far the trainings are apart."""
    rows = {SINGLE: row_of(result, SINGLE), BASE: row_of(result, BASE), **settled(result)}
    norms = [t["norm"] for t in result["training"]]
    apart = {
        "steps_ratio": _ratio([m.training.steps for m in merge.models]),
        "lr_ratio": _ratio([m.training.lr for m in merge.models]),
        "norm_ratio": _ratio(norms),
    }
    reference = normalised(rows[REFERENCE])
    return [
        {
            "kind": kind,
            "rule": name,
            "seed": merge.seed,
            "mean": row["mean"],
            "normalized": normalised(row),
            "gain": normalised(row) - reference,
            "scaling_coef": row["scaling_coef"],
            **apart,
        }
        for name, row in rows.items()
    ]


def _ratio(values: Sequence[float]) -> float:
    return max(values) / min(values) if min(values) > 0 else math.inf


def _row(kind: str, rule: str, points: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    own = [p for p in points if p["kind"] == kind and p["rule"] == rule]
    if not own:
        return None
    gains = [p["gain"] for p in own]
    return {
        "kind": kind,
        "rule": rule,
        **asdict(summary([p["normalized"] for p in own])),
        "accuracy": summary([p["mean"] for p in own]).mean,
        **gained(gains, told=rule not in (SINGLE, BASE, REFERENCE)),
    }


def _relation(rule: str, points: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Pearson's r between a rule's gain and how far steps and norms are apart (log of largest over smallest)."""
    own = [p for p in points if p["rule"] == rule]
    if rule == REFERENCE or not own:
        return None
    gains = [p["gain"] for p in own]
    return {
        "rule": rule,
        "points": len(own),
        **{
            key: correlation([math.log(p[f"{key}_ratio"]) for p in own], gains)
            for key in ("steps", "norm")
            if all(math.isfinite(p[f"{key}_ratio"]) for p in own)
        },
    }
