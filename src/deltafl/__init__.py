"""deltafl: a task vector and a client update are the same thing, a delta; merging is one server step."""

from typing import Any

from deltafl.version import __version__

__all__ = ["__version__"]
_HOMES: dict[str, str] = {}


def __getattr__(name: str) -> Any:
    """Import a public name from its home on first use, so that `import deltafl` costs nothing."""
    if name in _HOMES:
        import importlib

        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'deltafl' has no attribute {name!r}")
