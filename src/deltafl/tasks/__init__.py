"""Tasks: what a user names as data, in the one form in which everything trains and judges."""

from deltafl.tasks.images import Images, ImageTask
from deltafl.tasks.inputs import ImageInput, TextInput
from deltafl.tasks.loading import load_task
from deltafl.tasks.recipe import DataRecipe
from deltafl.tasks.task import Task
from deltafl.tasks.text import TextTask

__all__ = [
    "DataRecipe",
    "ImageInput",
    "ImageTask",
    "Images",
    "Task",
    "TextInput",
    "TextTask",
    "load_task",
]
