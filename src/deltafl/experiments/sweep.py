"""Experiments as data: a cell is labels and the work behind them, a sweep does every work once, and
what it finds becomes the rows of a table and the curves of a figure: means, spreads, intervals.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd
from scipy import stats

from deltafl.checkpoints.layout import file_hash
from deltafl.errors import DeltaflError
from deltafl.files import write_atomically
from deltafl.forking import can_fork
from deltafl.pool import Pool
from deltafl.progress import OnProgress, Progress, ignore
from deltafl.tasks.task import hash_of

Result = Mapping[str, Any]
"""What a work finds, as JSON values; {"failed": why} where it cannot be done. Its `points` are the
records that tables are made of.
"""


class Work(ABC):
    """A piece of work: a training, a search, a federated run. Subclasses are frozen dataclasses.

    kind: what progress calls it, and the folder of its results. alone: it uses all cores itself.
    """

    kind: ClassVar[str]
    alone: ClassVar[bool] = False

    @abstractmethod
    def content(self) -> Mapping[str, object]:
        """All that decides the result: JSON values, and works by their own content. A file that is
        named counts by what it holds; no other path belongs here.
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


@dataclass(frozen=True)
class Cell:
    """One run behind a row of a table: what sets the row apart (column -> value), and the work."""

    labels: Mapping[str, str | float | int]
    work: Work

    @property
    def name(self) -> str:
        """The labels in one line, numbers with what they are of."""
        named = (v if isinstance(v, str) else f"{key} = {v}" for key, v in self.labels.items())
        return ", ".join(named)


@dataclass(frozen=True)
class Store:
    """Where results are kept, each under the content of its work: found again in whichever suite
    asks for it, and after the folder was moved.
    """

    folder: Path

    def place(self, work: Work) -> Path:
        """The folder of a work."""
        key = hash_of(json.dumps(_by_content(work), sort_keys=True))[:16]
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


def _by_content(value: object) -> object:
    """JSON values in which a work is its content, and the path of a file its hash."""
    if isinstance(value, Work):
        return _by_content(value.content())
    if isinstance(value, Mapping):
        return {key: _by_content(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_by_content(v) for v in value]
    return file_hash([Path(value)]) if isinstance(value, str) and Path(value).is_file() else value


Sweep = Callable[[Sequence[Work]], list[Result]]
"""`sweep` with everything but the works given."""


def sweep(
    works: Sequence[Work],
    store: Store,
    *,
    jobs: int = 1,
    name: str = "",
    on_progress: OnProgress = ignore,
) -> list[Result]:
    """The results of all works, in order, what they need first; each distinct work is done once.

    `jobs` works are done at a time, each in a forked process on one core, where processes can be
    forked; the results are the same for any number. A work that cannot be done is {"failed": why},
    and the others go on. name: what progress says before the kind of work.

    Raises:
        DeltaflError: a work that others need cannot be done.
    """
    if needed := list(dict.fromkeys(need for work in works for need in work.needs())):
        require_done(sweep(needed, store, jobs=jobs, name=name, on_progress=on_progress))
    distinct, results = list(dict.fromkeys(works)), dict[Work, Result]()

    def outcome(at: int) -> Result:
        try:
            return store.result(distinct[at])
        except DeltaflError as error:
            return {"failed": str(error)}

    order, alone = range(len(distinct)), any(work.alone for work in distinct)
    with Pool(outcome, min(jobs, len(order)) if can_fork() and not alone else 1) as pool:
        outcomes = map(outcome, order) if alone else pool.map(order)
        for done, (work, result) in enumerate(zip(distinct, outcomes, strict=True), 1):
            results[work] = result
            on_progress(Progress(f"{name}{work.kind}", done, len(order)))
    return [results[work] for work in works]


def require_done(results: Sequence[Result]) -> None:
    """Raise DeltaflError with why some could not be done."""
    if failed := [result["failed"] for result in results if "failed" in result]:
        raise DeltaflError(*dict.fromkeys(failed))


Found = Sequence[tuple[Cell, Result]]
"""The cells of an experiment, of all seeds, and what was found for each."""

Curve = Sequence[Sequence[float]]
"""Points (x, y)."""


def points_of(found: Found) -> pd.DataFrame:
    """Every point with the labels of its cell; of a cell that failed the labels alone."""
    return pd.DataFrame(
        [{**cell.labels, **point} for cell, one in found for point in one.get("points", [{}])]
    )


def tabulate(
    points: pd.DataFrame, by: list[str], score: str, *means: str
) -> list[dict[str, object]]:
    """A row for each group of points: the mean, the sample standard deviation (spread) and the
    number (runs) of a score; mean and spread of more columns; and of gains, if there are, the mean
    with Student's 95 % interval, mean -+ t_{n-1} s / sqrt(n). NaN: not known, as the spread of one.
    """
    groups = points.groupby(by, sort=False)
    rows = groups[score].agg(mean="mean", spread="std", runs="count")
    for key in means:
        rows[key], rows[f"{key}_spread"] = groups[key].mean(), groups[key].std()
    if "gain" in points:
        gains = groups["gain"]
        gain, half = gains.mean(), gains.sem() * stats.t.ppf(0.975, gains.count() - 1)
        rows = rows.assign(gain=gain, low=gain - half, high=gain + half)
    return rows.reset_index().to_dict("records")


def mean_curves(curves: Iterable[tuple[str, Curve]]) -> dict[str, Curve]:
    """Name -> mean of the curves of that name, point by point, as far as all of them go."""
    named: dict[str, list[Curve]] = {}
    for name, curve in curves:
        named.setdefault(name, []).append(curve)
    shortest = {name: min(map(len, own)) for name, own in named.items()}
    return {
        name: np.mean([curve[: shortest[name]] for curve in own], axis=0).tolist()
        for name, own in named.items()
    }
