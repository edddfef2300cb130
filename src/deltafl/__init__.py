"""deltafl: a task vector and a client update are one thing, a delta; merging is one server step."""

import importlib
from typing import TYPE_CHECKING

from deltafl.version import __version__

if TYPE_CHECKING:
    from deltafl.algebra.aggregate import aggregate, step
    from deltafl.algebra.deltas import Update
    from deltafl.merge.modules import sequential_regression
    from deltafl.merge.task_vector import (
        TaskVector,
        cclip,
        fedavg,
        fedgma,
        fednova,
        median,
        task_arithmetic,
    )
    from deltafl.rules.rule import Source

__all__ = [
    "Source",
    "TaskVector",
    "Update",
    "__version__",
    "aggregate",
    "cclip",
    "fedavg",
    "fedgma",
    "fednova",
    "median",
    "sequential_regression",
    "step",
    "task_arithmetic",
]

_ELSEWHERE = {
    "aggregate": "algebra.aggregate",
    "step": "algebra.aggregate",
    "sequential_regression": "merge.modules",
}


def __getattr__(name: str) -> object:
    """Import a public name on first use, so that `import deltafl` costs nothing."""
    if name in __all__:
        home = _ELSEWHERE.get(name, "merge.task_vector")
        return vars(importlib.import_module(f"deltafl.{home}"))[name]
    raise AttributeError(f"module 'deltafl' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
