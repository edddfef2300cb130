import os

import pytest

from deltafl.errors import DeltaflError
from deltafl.files import write_atomically
from deltafl.training.record import RunRecord, read_rows, without_timings, write_json


def test_rows_come_back_in_order_and_config_as_written(tmp_path):
    config = {"seed": 0, "rules": ["median", "fedgma"], "name": "Straße"}
    record = RunRecord.create(tmp_path / "run", config)
    rows = [
        {"event": "candidate", "score": 0.1 + 0.2},
        {"event": "ä\u2028b", "nested": {"a": [1, None]}},
    ]
    for row in rows:
        record.append(row)
    reopened = RunRecord.resume(tmp_path / "run")
    assert reopened.rows() == rows
    assert reopened.config() == config


@pytest.mark.parametrize("torn", [b'{"event": "cand', b'{"event": "candidate"}', b"\xff\xc3"])
def test_a_torn_last_line_is_ignored_and_overwritten_on_resume(tmp_path, torn):
    record = RunRecord.create(tmp_path, {})
    record.append({"n": 1})
    with record.rows_path.open("ab") as file:
        file.write(torn)
    assert read_rows(record.rows_path) == [{"n": 1}]
    resumed = RunRecord.resume(tmp_path)
    resumed.append({"n": 2})
    assert record.rows_path.read_bytes() == b'{"n": 1}\n{"n": 2}\n'


def test_pieces_of_files_that_a_kill_left_are_gone_after_a_resume(tmp_path):
    RunRecord.create(tmp_path, {})
    for name in (
        ".result.json.0f1f4963.tmp",
        ".record.jsonl.27f72a31.tmp",
        ".mine.tmp",
        "notes.tmp",
    ):
        (tmp_path / name).write_text("half")
    RunRecord.resume(tmp_path)
    assert sorted(f.name for f in tmp_path.iterdir()) == [
        ".mine.tmp",
        "config.yaml",
        "notes.tmp",
        "record.jsonl",
    ]


def test_a_second_run_in_one_folder_is_refused(tmp_path):
    RunRecord.create(tmp_path, {"seed": 0}).append({"n": 1})
    with pytest.raises(DeltaflError, match="--resume"):
        RunRecord.create(tmp_path, {"seed": 1})
    assert RunRecord.resume(tmp_path).config() == {"seed": 0}


@pytest.mark.parametrize(
    ("line", "says"), [(b"{oops}", "line 2 is not JSON"), (b"[1]", "line 2 holds a list")]
)
def test_a_broken_line_in_the_middle_names_file_and_line(tmp_path, line, says):
    path = tmp_path / "record.jsonl"
    path.write_bytes(b'{"n": 1}\n' + line + b'\n{"n": 3}\n')
    with pytest.raises(DeltaflError, match=says) as caught:
        RunRecord.resume(tmp_path)
    assert str(path) in str(caught.value)
    assert path.read_bytes().endswith(b'{"n": 3}\n')


def test_a_folder_that_is_no_run_says_so(tmp_path):
    with pytest.raises(DeltaflError, match="run directory"):
        RunRecord.resume(tmp_path)
    with pytest.raises(DeltaflError, match="run directory"):
        RunRecord(tmp_path).config()


@pytest.mark.parametrize(("text", "says"), [("a: [1", "is not YAML"), ("- 1\n", "holds a list")])
def test_a_config_that_is_no_mapping_says_so(tmp_path, text, says):
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(DeltaflError, match=says):
        RunRecord(tmp_path).config()


def test_numbers_json_has_no_word_for_become_null(tmp_path):
    record = RunRecord.create(tmp_path, {})
    record.append({"score": float("nan"), "all": [float("inf"), 1.5]})
    assert record.rows() == [{"score": None, "all": [None, 1.5]}]
    assert (
        write_json(tmp_path / "a.json", {"x": float("-inf")}).read_text() == '{\n  "x": null\n}\n'
    )


def test_a_row_that_is_not_json_leaves_the_record_as_it_was(tmp_path):
    record = RunRecord.create(tmp_path, {})
    with pytest.raises(TypeError):
        record.append({"x": object()})
    assert record.rows_path.read_bytes() == b""


def test_timings_are_what_differs_between_runs():
    rows = [{"n": 1, "seconds": 0.2, "eval_seconds": 3}]
    assert without_timings(rows) == [{"n": 1}]
    assert rows[0]["seconds"] == 0.2


def test_write_atomically_replaces_whole_with_the_permissions_of_an_ordinary_file(tmp_path):
    path = tmp_path / "deep" / "state.bin"
    write_atomically(path, b"old, and longer")
    write_atomically(path, b"new")
    (tmp_path / "ordinary").touch()
    assert path.read_bytes() == b"new"
    assert path.stat().st_mode == (tmp_path / "ordinary").stat().st_mode
    assert [p.name for p in path.parent.iterdir()] == ["state.bin"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failure_while_writing_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, step):
    path = write_atomically(tmp_path / "state.bin", b"old")

    def fail(*_args):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, step, fail)
        with pytest.raises(OSError, match="No space"):
            write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_state_files_live_under_state(tmp_path):
    record = RunRecord.create(tmp_path, {})
    assert (
        record.write_state("round.bin", b"1").relative_to(tmp_path).as_posix() == "state/round.bin"
    )
