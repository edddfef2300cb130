"""The bars of all commands."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from deltafl.progress import OnProgress, Progress, ignore


@contextmanager
def drawn_progress() -> Iterator[OnProgress]:
    """One bar on stderr for each name of a Progress, with counts, numbers and remaining time; none
    off a terminal, and none where nothing is said.

    It is drawn at most ten times a second by the thread that reports: a thread of its own could
    hold a lock while another part of the program forks, which is why that part does not fork where
    there is one (`can_fork`).
    """
    if sys.stdout is None or not sys.stderr.isatty():
        yield ignore
        return
    texts = TextColumn("{task.description}"), TextColumn("{task.fields[seen]}")
    columns = texts[0], BarColumn(), texts[1], TimeElapsedColumn(), TimeRemainingColumn()
    console = Console(stderr=True)
    with Bars(*columns, console=console, transient=True, auto_refresh=False) as bars:
        tasks: dict[str, TaskID] = {}
        drawn = 0.0

        def show(progress: Progress) -> None:
            nonlocal drawn
            name, done, total = progress.name, progress.done, progress.total
            if name not in tasks:  # what an earlier run has done is no part of the rate
                tasks[name] = bars.add_task(name, total=total, completed=done, seen="")
            bars.update(tasks[name], completed=done, total=total)
            if done >= total or time.monotonic() - drawn >= 0.1:
                drawn = time.monotonic()
                bars.update(tasks[name], seen=progress_text(progress))
                bars.refresh()

        yield show


def progress_text(progress: Progress) -> str:
    """`12/40, loss 0.31`, or `1.2 GB/3.4 GB`."""
    numbers = dict(progress.numbers)
    count = decimal if numbers.pop("unit", "") == "bytes" else str
    shown = (
        f"{key} {v if isinstance(v, str) else f'{float(v):.4g}'}" for key, v in numbers.items()
    )
    return ", ".join([f"{count(progress.done)}/{count(progress.total)}", *shown])
