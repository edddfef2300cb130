"""How far along the merged delta: curves of validation score against lambda, for every rule, over all tasks."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from deltafl.experiments.one_shot import BASE, SINGLE
from deltafl.experiments.studies.merging import Merge, Tuned, Work, normalised, row_of, settled
from deltafl.experiments.studies.statistics import summary
from deltafl.experiments.studies.study import Data, Study


def scaling_coef(study: Study, work: Work) -> dict[str, Any]:
    """The mean curve of every rule over seeds (the best of its other parameters at each lambda), and its test score.

    Every point is exact: these searches are exhaustive.
    """
    merges = [
        Merge(tuple(Tuned(Data(s), study.training, seed) for s in study.tasks))
        for seed in study.seeds
    ]
    results = replace(work, study=replace(study, strategy="exhaustive")).search(merges)
    rules = [name for name, _ in study.methods if name not in results[0]["left_out"]]
    return {
        "rows": [_row(rule, results) for rule in (SINGLE, BASE, *rules)],
        "curves": {
            rule: _mean_curve([dict(map(tuple, r["curves"][rule])) for r in results])
            for rule in rules
        },
        "base": summary([row_of(r, BASE)["val"] for r in results]).mean,
        "notes": [f"{name}: {why}" for name, why in results[0]["left_out"].items()],
    }


def _mean_curve(curves: Sequence[Mapping[float, float]]) -> list[tuple[float, float]]:
    shared = sorted(set.intersection(*(set(curve) for curve in curves)))
    return [(x, summary([curve[x] for curve in curves]).mean) for x in shared]


def _row(rule: str, results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    rows = [row_of(r, rule) if rule in (SINGLE, BASE) else settled(r)[rule] for r in results]
    coefs = [row["scaling_coef"] for row in rows if row["scaling_coef"] is not None]
    return {
        "rule": rule,
        **asdict(summary([normalised(row) for row in rows])),
        "accuracy": summary([row["mean"] for row in rows]).mean,
        "scaling_coef": summary(coefs).mean if coefs and rule != BASE else None,
    }
