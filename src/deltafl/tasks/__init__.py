"""Data sets: each family turns what a user names into a `Task`."""

from deltafl.tasks import digits  # noqa: F401  (registers the family)
from deltafl.tasks.arrays import Split, Task
from deltafl.tasks.loading import load_task

__all__ = ["Split", "Task", "load_task"]
