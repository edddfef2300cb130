"""deltafl: a task vector and a client update are the same thing, a delta; merging is one server step."""

from typing import TYPE_CHECKING, Any

from deltafl.version import __version__

if TYPE_CHECKING:
    from deltafl.aggregation import Update, aggregate, step
    from deltafl.rules import Source
    from deltafl.taskvector import TaskVector, cclip, fedavg, fedgma, fednova, median, task_arithmetic

_HOMES = {
    "Source": "deltafl.rules",
    "TaskVector": "deltafl.taskvector",
    "Update": "deltafl.aggregation",
    "aggregate": "deltafl.aggregation",
    "cclip": "deltafl.taskvector",
    "fedavg": "deltafl.taskvector",
    "fedgma": "deltafl.taskvector",
    "fednova": "deltafl.taskvector",
    "median": "deltafl.taskvector",
    "step": "deltafl.aggregation",
    "task_arithmetic": "deltafl.taskvector",
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
