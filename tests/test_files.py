"""A folder is whole or absent, whatever ends the process that writes it."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from checkpoint_files import fails, files_in
from deltafl.errors import DeltaflError
from deltafl.files import atomic_folder, check_output, write_atomically


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def write(path: Path, text: str, *, overwrite: bool = False) -> None:
    with atomic_folder(path, overwrite=overwrite) as folder:
        (folder / "deltafl.json").write_text(text)


def test_a_folder_appears_when_the_block_ends(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "a/b/out") as folder:
        (folder / "x").write_text("1")
        assert not (tmp_path / "a/b/out").exists()
    assert files_in(tmp_path) == {"a/": b"", "a/b/": b"", "a/b/out/": b"", "a/b/out/x": b"1"}


def begin(path: Path, failure: type[BaseException]) -> None:
    """Write a half, and fail."""
    with atomic_folder(path, overwrite=True) as folder:
        (folder / "x").write_text("1")
        raise failure


@pytest.mark.parametrize("failure", [ValueError, KeyboardInterrupt, SystemExit])
def test_where_the_block_fails_all_is_as_before(tmp_path: Path, failure: type[BaseException]):
    with pytest.raises(failure):
        begin(tmp_path / "out", failure)
    assert names(tmp_path) == []
    (tmp_path / "out").mkdir()  # may be filled
    write(tmp_path / "out", "old")
    with pytest.raises(failure):
        begin(tmp_path / "out", failure)
    assert files_in(tmp_path) == {"out/": b"", "out/deltafl.json": b"old"}


def test_what_was_there_is_back_where_the_replacement_fails(tmp_path, monkeypatch):
    write(tmp_path / "out", "old")
    rename, calls = os.rename, []

    def fail_once(source, target) -> None:
        calls.append(source)
        if len(calls) == 2:
            raise OSError(5, "input/output error")
        rename(source, target)

    monkeypatch.setattr(os, "rename", fail_once)
    with pytest.raises(OSError, match="input/output error"):
        write(tmp_path / "out", "new", overwrite=True)
    assert files_in(tmp_path) == {"out/": b"", "out/deltafl.json": b"old"}


def test_an_existing_folder_needs_overwrite(tmp_path: Path) -> None:
    write(tmp_path / "out", "old")
    with pytest.raises(
        DeltaflError, match="exists; choose another --out, or replace it with --overwrite"
    ):
        write(tmp_path / "out", "new")
    write(tmp_path / "out", "new", overwrite=True)
    assert files_in(tmp_path) == {"out/": b"", "out/deltafl.json": b"new"}


def test_a_folder_that_came_into_being_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    with pytest.raises(DeltaflError, match="exists"), atomic_folder(tmp_path / "out") as folder:  # noqa: PT012
        (folder / "x").write_text("mine")
        write(tmp_path / "out", "another process was faster")
    assert files_in(tmp_path) == {"out/": b"", "out/deltafl.json": b"another process was faster"}


def test_a_link_to_a_folder_is_followed(tmp_path: Path) -> None:
    write(tmp_path / "real", "old")
    (tmp_path / "link").symlink_to("real")
    write(tmp_path / "link", "new", overwrite=True)
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real/deltafl.json").read_text() == "new"
    assert names(tmp_path) == ["link", "real"]


OURS = [["deltafl.json"], ["record.jsonl"], ["training.json"], ["deltafl_model.json"],
        ["config.json", "model.safetensors"], ["config.json", "pytorch_model.bin"]]  # fmt: skip
FOREIGN = [["thesis.tex"], ["config.json"], ["model.safetensors"], ["src"]]


@pytest.mark.parametrize("held", [*OURS, *FOREIGN], ids="+".join)
def test_only_models_and_runs_may_be_overwritten(tmp_path: Path, held: list[str]) -> None:
    for name in held:
        (tmp_path / name).write_text("precious")
    for path in [tmp_path, tmp_path / held[0]] if held in FOREIGN else [tmp_path / held[0]]:
        with pytest.raises(DeltaflError, match="does not look like a model or a run; --overwrite"):
            check_output(path, overwrite=True)
    if held in OURS:
        check_output(tmp_path, overwrite=True)


DEAD = f"{platform.node()}-{2**22 + 1}"
"""The name of a process that cannot be: Linux counts to 2^22."""


def test_what_a_kill_between_two_renames_took_away_is_put_back(tmp_path: Path) -> None:
    write(tmp_path / "out", "old")
    (tmp_path / "out").rename(tmp_path / f".out.{DEAD}-0123abcd.old.tmp")
    (tmp_path / f".out.{DEAD}-0123abcd.tmp").mkdir()
    fails("exists", write, tmp_path / "out", "new")
    assert files_in(tmp_path) == {"out/": b"", "out/deltafl.json": b"old"}


WRITER = """
import sys
from deltafl.files import atomic_folder
with atomic_folder(sys.argv[1]) as folder:
    (folder / "half").write_text("half")
    print(folder.name, flush=True)
    sys.stdin.read()
"""


def test_only_a_process_that_was_killed_leaves_something_to_remove(tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-c", WRITER, str(out)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout
        living = process.stdout.readline().strip()
        write(out, "new")
        assert names(tmp_path) == sorted([living, "out"])
        process.kill()
    write(out, "newer", overwrite=True)
    assert names(tmp_path) == ["out"]


def test_what_belongs_to_another_output_is_left_alone(tmp_path: Path) -> None:
    others = [
        f".out2.{DEAD}-0123abcd.tmp",
        ".out.notes.tmp",
        f".out.another-machine-{DEAD.rpartition('-')[2]}-0123abcd.tmp",
        f".out.{platform.node()}-{os.getpid()}-0123abcd.tmp",  # of a thread beside this one
    ]
    for name in others:
        (tmp_path / name).mkdir()
    write(tmp_path / "out", "new")
    assert names(tmp_path) == sorted([*others, "out"])


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    file = write_atomically(tmp_path / "a/x", b"one")
    write_atomically(file, b"two")
    assert files_in(tmp_path) == {"a/": b"", "a/x": b"two"}


def test_a_failed_write_leaves_the_old_file_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = write_atomically(tmp_path / "x", b"one")

    def fail(handle: int) -> None:
        raise OSError(28, "no space")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="no space"):
        write_atomically(file, b"two")
    assert files_in(tmp_path) == {"x": b"one"}
