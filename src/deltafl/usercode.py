"""A user's own code by name, `module:attr`, from the working directory or installed."""

import importlib
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from deltafl.errors import DeltaflError, did_you_mean


def find_callable(ref: str, kind: str) -> Callable[..., Any]:
    """The callable behind `module:attr`; `kind` is what error messages call it.

    Raises:
        DeltaflError: no such module or attribute, or the module cannot be imported.
    """
    module_name, _, attribute = ref.partition(":")
    with importable():
        try:
            source = importlib.import_module(module_name)
        except (ImportError, ValueError) as error:
            raise DeltaflError(
                f'{kind} "{ref}": module "{module_name}" cannot be imported: {error}'
            ) from error
    found = getattr(source, attribute, None)
    if not callable(found):
        public = [n for n, v in vars(source).items() if callable(v) and not n.startswith("_")]
        hint = did_you_mean(attribute, public)
        raise DeltaflError(f'{kind} "{ref}": "{module_name}" has no callable "{attribute}"; {hint}')
    return found


@contextmanager
def importable() -> Iterator[None]:
    """Within the block, modules in the working directory can be imported."""
    here = os.getcwd()
    if here in sys.path:
        yield
        return
    sys.path.insert(0, here)
    try:
        yield
    finally:
        sys.path.remove(here)
