"""Data sets: each family turns what a user names into a `Task`."""

from deltafl.tasks import digits  # noqa: F401  (registers the family)
from deltafl.tasks.loading import load_task
from deltafl.tasks.task import Split, Task

__all__ = ["Split", "Task", "load_task"]
