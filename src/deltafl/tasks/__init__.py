"""Tasks: what a user names as data, in the one form in which everything trains and judges."""

from deltafl.tasks.images import Images, ImageTask
from deltafl.tasks.inputs import ImageInput, TextInput
from deltafl.tasks.lines import LineTask
from deltafl.tasks.loading import load_task
from deltafl.tasks.recipe import DataRecipe
from deltafl.tasks.task import Task

__all__ = [
    "DataRecipe",
    "ImageInput",
    "ImageTask",
    "Images",
    "LineTask",
    "Task",
    "TextInput",
    "load_task",
]
