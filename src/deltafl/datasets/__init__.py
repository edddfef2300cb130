"""Data sets: each family turns what a user names into a `Task`."""

from deltafl.datasets import digits  # noqa: F401  (registers the family)
from deltafl.datasets.loading import load_task
from deltafl.datasets.task import Split, Task

__all__ = ["Split", "Task", "load_task"]
