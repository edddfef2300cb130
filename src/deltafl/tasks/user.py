"""`module:attr`: a task made by the user's own code."""

from inspect import signature

from deltafl.errors import DeltaflError, did_you_mean
from deltafl.tasks.inputs import ImageInput, TextInput
from deltafl.tasks.raw import FAMILIES
from deltafl.tasks.task import Task
from deltafl.usercode import find_callable, importable


def user_task(spec: str, inputs: ImageInput | TextInput, seed: int) -> Task:
    """What `attr` of `module` returns, called as `attr(inputs, seed)`; the working directory is
    importable meanwhile.

    Raises:
        DeltaflError: no such module or function, other arguments, or a result that is no `Task`.
    """
    try:
        function = find_callable(spec, "data")
    except DeltaflError as error:
        hint = did_you_mean(spec.partition(":")[0], FAMILIES)
        raise DeltaflError(f"{error}; {hint}") from error
    try:
        signature(function).bind(inputs, seed)
    except TypeError as error:
        raise DeltaflError(
            f'data "{spec}" is called with (inputs, seed); inputs has image_size and channels, or '
            f"tokenizer and max_length: {error}"
        ) from error
    with importable():
        task = function(inputs, seed)
    if not isinstance(task, Task):
        raise DeltaflError(
            f'data "{spec}" returned {type(task).__name__}, not a deltafl.tasks.Task; return '
            'ImageTask(name, {"train": Images(images, labels), "val": .., "test": ..}, class_names)'
        )
    return task
