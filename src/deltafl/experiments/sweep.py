"""Experiments as data: a cell is labels and the work behind them; a sweep does every work once."""

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from deltafl.checkpoints.layout import file_hash
from deltafl.errors import DeltaflError
from deltafl.files import write_atomically
from deltafl.forking import can_fork
from deltafl.pool import Pool
from deltafl.progress import OnProgress, Progress, ignore
from deltafl.tasks.task import hash_of

Result = Mapping[str, Any]
"""What a work finds, as JSON values; {"failed": why} where it cannot be done."""


class Work(ABC):
    """A piece of work: a training, a search, a federated run. Subclasses are frozen dataclasses.

    kind: what progress calls it, and the folder of its results. alone: it uses all cores itself.
    """

    kind: ClassVar[str]
    alone: ClassVar[bool] = False

    @abstractmethod
    def content(self, store: "Store") -> Mapping[str, Any]:
        """All that decides the result, as JSON values. A file that is named counts by what it holds;
        no other path belongs here.
        """

    @abstractmethod
    def run(self, folder: Path, store: "Store") -> Result:
        """Do it; `folder` is for whatever files it leaves, and may hold those of a killed run.

        Raises:
            DeltaflError: it cannot be done.
        """

    def title(self) -> str:
        """What its folder is called, before its key."""
        return self.kind

    def needs(self) -> Iterable["Work"]:
        """Works whose results this one reads."""
        return ()


W = TypeVar("W", bound=Work)


@dataclass(frozen=True)
class Cell(Generic[W]):
    """One run behind a row of a table: what sets the row apart (column -> value), and the work."""

    labels: Mapping[str, str | float | int]
    work: W

    @property
    def name(self) -> str:
        """The labels in one line, numbers with what they are of."""
        named = (v if isinstance(v, str) else f"{key} = {v}" for key, v in self.labels.items())
        return ", ".join(named)


@dataclass(frozen=True)
class Store:
    """Where results are kept, each under the content of its work: found again in whichever suite asks
    for it, and after the folder was moved.
    """

    folder: Path

    def place(self, work: Work) -> Path:
        """The folder of a work."""
        key = hash_of(json.dumps(_by_content(work.content(self)), sort_keys=True))[:16]
        return self.folder / work.kind / f"{work.title()}-{key}"

    def result(self, work: Work) -> Result:
        """What the work finds, from disk where it was done before. Raises DeltaflError."""
        place = self.place(work)
        file = place / "found.json"
        if not file.is_file():
            found = json.dumps(work.run(place, self))
            place.mkdir(parents=True, exist_ok=True)
            write_atomically(file, found.encode())
        return json.loads(file.read_text())


def _by_content(value: Any) -> Any:
    """JSON values in which the path of a file is the hash of what it holds."""
    if isinstance(value, Mapping):
        return {key: _by_content(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_by_content(v) for v in value]
    return file_hash([Path(value)]) if isinstance(value, str) and Path(value).is_file() else value


Sweep = Callable[[Sequence[Work]], list[Result]]
"""`sweep` with everything but the works given."""


def sweep(
    works: Sequence[Work], store: Store, *, jobs: int = 1, on_progress: OnProgress = ignore
) -> list[Result]:
    """The results of all works, in order, what they need first; each distinct work is done once.

    `jobs` works are done at a time, each in a forked process on one core, where processes can be
    forked; the results are the same for any number. A work that cannot be done is {"failed": why},
    and the others go on.

    Raises:
        DeltaflError: a work that others need cannot be done.
    """
    if needed := list(dict.fromkeys(need for work in works for need in work.needs())):
        found = sweep(needed, store, jobs=jobs, on_progress=on_progress)
        if failed := [result["failed"] for result in found if "failed" in result]:
            raise DeltaflError(*dict.fromkeys(failed))
    distinct, results = list(dict.fromkeys(works)), dict[Work, Result]()
    at_once = 1 if any(work.alone for work in distinct) else min(jobs, len(distinct))

    def outcome(at: int) -> Result:
        try:
            return store.result(distinct[at])
        except DeltaflError as error:
            return {"failed": str(error)}

    def outcomes() -> Iterator[Result]:
        if any(work.alone for work in distinct):
            yield from map(outcome, range(len(distinct)))
        else:
            with Pool(outcome, at_once if can_fork() else 1) as pool:
                yield from pool.map(range(len(distinct)))

    for done, (work, result) in enumerate(zip(distinct, outcomes(), strict=True), 1):
        results[work] = result
        on_progress(Progress(work.kind, done, len(distinct)))
    return [results[work] for work in works]
