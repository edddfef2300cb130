"""A sweep does each work once, what it needs first, keeps results by content, and tells of failures."""

from dataclasses import dataclass
from typing import ClassVar

import pytest

from deltafl.errors import DeltaflError
from deltafl.experiments.sweep import Cell, Store, Work, sweep


@dataclass(frozen=True)
class Number(Work):
    value: int
    file: str = ""
    parts: tuple["Number", ...] = ()
    kind: ClassVar[str] = "numbers"

    def content(self):
        return vars(self)

    def needs(self):
        return self.parts

    def run(self, folder, store):
        if self.value < 0:
            raise DeltaflError(f"{self.value} is below 0")
        folder.mkdir(parents=True)
        with (store.folder / "log").open("a") as log:
            log.write(f"{self.value}\n")
        return {"sum": self.value + sum(store.result(p)["sum"] for p in self.parts)}


def log(store: Store) -> list[str]:
    return (store.folder / "log").read_text().split()


@pytest.mark.parametrize("jobs", [1, 2])
def test_each_distinct_work_is_done_once_and_what_it_needs_first(tmp_path, jobs):
    store, one, two = Store(tmp_path), Number(1), Number(2)
    works = [Number(10, parts=(one, two)), Number(20, parts=(one,)), Number(10, parts=(one, two))]
    seen = []
    found = sweep(works, store, jobs=jobs, on_progress=lambda p: seen.append((p.done, p.total)))
    assert [r["sum"] for r in found] == [13, 21, 13]
    assert sorted(log(store)) == ["1", "10", "2", "20"]
    assert set(log(store)[:2]) == {"1", "2"}
    assert seen == [(1, 2), (2, 2), (1, 2), (2, 2)]
    assert sweep(works, store, jobs=jobs) == found
    assert len(log(store)) == 4


def test_results_are_found_again_after_the_folder_was_moved(tmp_path):
    (tmp_path / "input").write_text("a")
    store = Store(tmp_path / "first")
    store.folder.mkdir()
    work = Number(3, file=str(tmp_path / "input"))
    sweep([work], store)
    moved = Store(store.folder.rename(tmp_path / "second"))
    (tmp_path / "input").rename(tmp_path / "renamed")
    sweep([Number(3, file=str(tmp_path / "renamed"))], moved)
    assert log(moved) == ["3"]
    (tmp_path / "renamed").write_text("b")
    sweep([Number(3, file=str(tmp_path / "renamed"))], moved)
    assert log(moved) == ["3", "3"]


def test_a_work_that_cannot_be_done_says_why_and_the_others_go_on(tmp_path):
    found = sweep([Number(-1), Number(4)], Store(tmp_path))
    assert found == [{"failed": "-1 is below 0"}, {"sum": 4}]
    with pytest.raises(DeltaflError, match="-2 is below 0"):
        sweep([Number(5, parts=(Number(-2),))], Store(tmp_path))
    assert log(Store(tmp_path)) == ["4"]


def test_a_cell_is_named_by_its_labels():
    assert Cell({"sharding": "IID", "J": 4}, Number(1)).name == "IID, J = 4"
