"""What a user says of one-shot studies, with the defaults of arXiv 2411.18607; imports no torch."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from deltafl.errors import DeltaflError, did_you_mean
from deltafl.rules.rule import load_rules

STUDY_NAMES = (
    "training-heterogeneity",
    "data-heterogeneity",
    "scaling-coef",
    "negation",
    "analogy",
)

QUICK: Mapping[str, Any] = {
    "draws": 2,
    "methods": ["task_arithmetic", "fednova", "fedgma", "median", "cclip", "ties"],
    "scaling_coefs": [0.2, 0.4, 0.6, 0.8, 1.0],
    "val_limit": 200,
    "test_limit": 1000,
}
"""Of `--quick`, under what is given."""

BUNDLED: Mapping[str, Any] = {
    "tasks": ["digits:textured", "digits:thick", "digits:mirrored", "digits:outlined"],
    "lr_values": [3e-4, 1e-4],
    "steps_values": [40, 120],
    "control": "digits",
    "domains": ["digits:mirrored", "digits:thick"],
    "split": "digits:thick",
}
"""Without --model and --tasks: variants of the digits, for the bundled base."""


@dataclass(frozen=True)
class StudyOptions:
    """The settings of one-shot studies; see `deltafl.experiments.studies.study.Study`. None: see the help texts."""

    tasks: tuple[str, ...] = ()
    lr_values: tuple[float, ...] = (1e-4, 1e-5, 1e-6)
    steps_values: tuple[int, ...] = (1000, 2000, 3000, 4000)
    draws: int = 4
    methods: tuple[str, ...] = ()
    scaling_coefs: tuple[float, ...] = tuple(round(0.05 * i, 2) for i in range(1, 41))
    search_strategy: str = "racing"
    val_limit: int | None = None
    test_limit: int | None = None
    control: str | None = None
    domains: tuple[str, ...] = ()
    split: str | None = None
    jobs: int | None = None

    def problems(self, names: Sequence[str]) -> list[str]:
        """What is wrong for the studies called `names`, one line each."""
        known = load_rules()
        several = len(set(self.lr_values)) > 1 and len(set(self.steps_values)) > 1
        grid = (*self.lr_values, *self.scaling_coefs)
        rules = (
            (len(self.tasks) > 1, "give at least two data sets with --tasks"),
            (len(set(self.tasks)) == len(self.tasks), "--tasks names a data set twice"),
            (all(map(math.isfinite, grid)), "--lr-values and --scaling-coefs must be finite numbers"),
            (bool(self.scaling_coefs), "--scaling-coefs names no value"),
            (bool(self.lr_values) and all(lr > 0 for lr in self.lr_values), "--lr-values must be positive"),
            (bool(self.steps_values) and all(n > 0 for n in self.steps_values), "--steps-values must be positive"),
            (self.draws > 0, "--draws must be 1 or more"),
            (self.jobs is None or self.jobs > 0, "--jobs must be 1 or more"),
            (
                several or "training-heterogeneity" not in names,
                "training-heterogeneity needs at least two of --lr-values and two of --steps-values",
            ),
            (
                "analogy" not in names or len(self.domains) == len(set(self.domains)) == 2,
                "analogy needs --domains: two data sets with the same classes",
            ),
            *((m in known, f'unknown method "{m}"; {did_you_mean(m, list(known))}') for m in self.methods),
            *((limit is None or limit > 0, f"--{name}-limit must be 1 or more")
              for name, limit in (("val", self.val_limit), ("test", self.test_limit))),
        )  # fmt: skip
        return [problem for good, problem in rules if not good]

    def lacking(self) -> dict[str, str]:
        """Of `all` studies, those that these settings say nothing for, and what they need."""
        if len(self.tasks) < 2:
            return dict.fromkeys(STUDY_NAMES, "two data sets with --tasks")
        return {} if self.domains else {"analogy": "--domains"}

    def grids(self) -> tuple[tuple[str, Mapping[str, Any]], ...]:
        """(method, parameters) of the methods that are compared; task arithmetic, which gains refer to, goes first."""
        rules = load_rules()
        named = self.methods or tuple(rules)
        return tuple((m, rules[m].values) for m in dict.fromkeys(("task_arithmetic", *named)))


def names_of(asked: Sequence[str], known: Sequence[str]) -> list[str]:
    """The suites asked for, each once; "all" is every one.

    Raises:
        DeltaflError: no name, or an unknown one.
    """
    if not asked:
        raise DeltaflError(f"name a suite: {', '.join(known)}, or all")
    unknown = [name for name in asked if name not in known and name != "all"]
    if unknown:
        raise DeltaflError(
            *(f'no suite "{name}"; {did_you_mean(name, (*known, "all"))}' for name in unknown)
        )
    return list(known) if "all" in asked else list(dict.fromkeys(asked))
