"""Experiments as data: suites of federated runs, studies of merges, and the quickstart."""

from deltafl.experiments.quickstart import run_quickstart
from deltafl.experiments.recipe import SuiteRecipe, read_suite, suite_names
from deltafl.experiments.run import STUDIES, run_suites
from deltafl.experiments.suites import SUITES
from deltafl.experiments.sweep import sweep

__all__ = [
    "STUDIES",
    "SUITES",
    "SuiteRecipe",
    "read_suite",
    "run_quickstart",
    "run_suites",
    "suite_names",
    "sweep",
]
