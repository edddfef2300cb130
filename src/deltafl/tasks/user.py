"""`module:attr`: a task made by the user's own code."""

import importlib
from collections.abc import Callable
from typing import Any

from deltafl.errors import DeltaflError, did_you_mean
from deltafl.tasks.arrays import Task
from deltafl.tasks.source import FAMILIES
from deltafl.usercode import importable


def user_builder(spec: str) -> Callable[..., Task]:
    """`attr` of `module`, to be called as `attr(image_size=..., channels=..., seed=...)`.

    The working directory is importable while the module is imported and while the function runs.

    Raises:
        DeltaflError: there is no such module or function; the returned function raises it where the user's function
            returns no `Task`.
    """
    module_name, _, attr = spec.partition(":")
    with importable():
        try:
            module = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
                raise
            raise DeltaflError(
                f'no data set "{spec}": no module "{module_name}" in the working directory, and no registered '
                f"family of that name; {did_you_mean(module_name, FAMILIES)}"
            ) from error
    function = getattr(module, attr, None)
    if not callable(function):
        known = [name for name, value in vars(module).items() if callable(value)]
        raise DeltaflError(
            f'data set "{spec}": module has no function "{attr}"; {did_you_mean(attr, known)}'
        )

    def build(**arguments: Any) -> Task:
        with importable():
            task = function(**arguments)
        if not isinstance(task, Task):
            raise DeltaflError(
                f'data set "{spec}" returned a {type(task).__name__}, not a deltafl.tasks.Task.'
            )
        return task

    return build
