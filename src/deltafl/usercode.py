"""A user's own code by name, `module:attr`, from the working directory or installed."""

import os
import pkgutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from deltafl.errors import DeltaflError


def find_callable(ref: str, kind: str) -> Callable[..., Any]:
    """The callable behind `module:attr`; `kind` is what error messages call it.

    Raises:
        DeltaflError: no such module or attribute, or the module cannot be imported.
    """
    with importable():
        try:
            found = pkgutil.resolve_name(ref)
        except (ImportError, AttributeError, ValueError) as error:
            raise DeltaflError(f'{kind} "{ref}": cannot be imported: {error}') from error
    if not callable(found):
        raise DeltaflError(f'{kind} "{ref}": is not callable')
    return found


@contextmanager
def importable() -> Iterator[None]:
    """Within the block, modules in the working directory can be imported."""
    here = os.getcwd()
    sys.path.insert(0, here)
    try:
        yield
    finally:
        sys.path.remove(here)
