"""deltafl: a task vector and a client update are the same thing, a delta; merging is one server step."""

from typing import TYPE_CHECKING, Any

from deltafl.version import __version__

if TYPE_CHECKING:
    from deltafl.algebra.aggregate import aggregate, step
    from deltafl.algebra.deltas import Update
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

_HOMES = {
    "Source": "deltafl.rules.rule",
    "TaskVector": "deltafl.merge.task_vector",
    "Update": "deltafl.algebra.deltas",
    "aggregate": "deltafl.algebra.aggregate",
    "cclip": "deltafl.merge.task_vector",
    "fedavg": "deltafl.merge.task_vector",
    "fedgma": "deltafl.merge.task_vector",
    "fednova": "deltafl.merge.task_vector",
    "median": "deltafl.merge.task_vector",
    "step": "deltafl.algebra.aggregate",
    "task_arithmetic": "deltafl.merge.task_vector",
}

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
    "step",
    "task_arithmetic",
]


def __getattr__(name: str) -> Any:
    """Import a public name from its home on first use, so that `import deltafl` costs nothing."""
    if name in _HOMES:
        import importlib

        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'deltafl' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
