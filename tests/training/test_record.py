"""The record of a run: what comes back, what a kill leaves, what is refused."""

import pytest

from checkpoint_files import fails
from deltafl.errors import DeltaflError
from deltafl.training.record import RunRecord, read_rows, write_json


def test_rows_come_back_in_order_and_numbers_json_has_no_word_for_are_null(tmp_path):
    record = RunRecord.create(tmp_path / "run", {"name": "Straße"})
    row = {"event": "ä\u2028b", "score": 0.1 + 0.2, "nested": {"a": [1, None]}}
    record.append(row)
    record.append({"score": float("nan"), "all": [float("inf"), 1.5]}, sync=False)
    assert read_rows(record.path) == [row, {"score": None, "all": [None, 1.5]}]
    with pytest.raises(TypeError):
        record.append({"x": object()})
    assert len(read_rows(record.path)) == 2
    file = write_json(tmp_path / "a.json", {"x": float("-inf")})
    assert file.read_text() == '{\n  "x": null\n}\n'


@pytest.mark.parametrize("torn", [b'{"event": "cand', b'{"event": "candidate"}', b"\xff\xc3"])
def test_what_a_kill_tore_and_what_came_after_the_state_is_gone_on_resume(tmp_path, torn):
    record = RunRecord.create(tmp_path, {})
    for number in range(4):
        record.append({"round": number})
    with record.path.open("ab") as file:
        file.write(torn)
    pieces = (".result.json.0f1f4963.tmp", ".record.jsonl.27f72a31.tmp")
    for name in (*pieces, ".mine.tmp", "notes.tmp"):
        (tmp_path / name).write_text("half")
    assert len(read_rows(record.path)) == 4
    record.rewind("round", 2)
    record.append({"round": 3})
    lines = b"".join(b'{"round": %d}\n' % number for number in range(4))
    assert record.path.read_bytes() == lines
    left = [".mine.tmp", "config.yaml", "notes.tmp", "record.jsonl"]
    assert sorted(f.name for f in tmp_path.iterdir()) == left
    record.rewind("round", 0)
    assert record.path.read_bytes() == b""


def test_a_broken_line_in_the_middle_names_file_and_line(tmp_path):
    path = tmp_path / "record.jsonl"
    path.write_bytes(b'{"n": 1}\n{oops}\n{"n": 3}\n')
    fails(r'record.jsonl" line 2 is not JSON', read_rows, path)


@pytest.mark.parametrize("text", ["a: [1", "- 1\n", None])
def test_a_config_that_cannot_be_read_is_told_in_a_line(tmp_path, text):
    record = RunRecord.create(tmp_path, {})
    (tmp_path / "config.yaml").unlink()
    if text is not None:
        (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(DeltaflError, match=r"config.yaml") as caught:
        record.begun({}, resume=True, overwrite=False)
    assert len(caught.value.problems) == 1
