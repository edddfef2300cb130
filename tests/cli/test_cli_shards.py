"""`deltafl shards` from the outside."""

import json
from pathlib import Path

import pytest

from checkpoint_files import files_in, refusal, succeed
from deltafl.federated.sharding import ShardingRecipe, shard
from deltafl.seeding import keyed_generator
from deltafl.tasks import ImageInput, load_task

TASK = ("shards", "tiny_models:tiny_task_factory", "--channels", 1)


def rows_of(said: str) -> list[list[str]]:
    lines = said.split("---\n")[-1].splitlines()
    return [line.split() for line in lines if line and not line.startswith("report")]


def test_the_table_and_the_file_tell_what_the_library_gives(tmp_path: Path):
    out = tmp_path / "out"
    options = ("--num-clients", 10, "--sharding", "non_iid", "--nc", 2, "--seed", 3)
    said = succeed("shards", "digits", *options, "--out", out).out
    labels = load_task("digits", ImageInput(8), 3).groups("train")
    recipe = ShardingRecipe.of(num_clients=10, sharding="non_iid", nc=2)
    expected = shard(labels, recipe, keyed_generator(3, "shards"))
    held = json.loads((out / "shards.json").read_text())
    assert held["positions"] == [rows.tolist() for rows in expected]
    assert held["sharding"] == {"name": "non_iid", "nc": 2}
    facts = ("digits", 3, 10, 0)
    assert tuple(held[k] for k in ("task", "seed", "num_clients", "duplicates")) == facts
    assert "10 clients, 600 samples; 59 to 61 a client, of 2 classes" in said
    for client, (row, rows) in enumerate(zip(rows_of(said), expected, strict=True)):
        classes = sorted(set(labels[rows].tolist()))
        assert row == [str(client), str(len(rows)), "2", f'"{classes[0]}",', f'"{classes[1]}"']
    assert sorted(files_in(out)) == ["figure.png", "report.html", "shards.json"]
    assert str(out / "report.html") in said


def test_many_clients_are_told_by_the_first_and_the_last_and_left_out_classes_by_name(tmp_path):
    clients = [row[0] for row in rows_of(succeed("shards", "digits", "--num-clients", 21).out)]
    assert clients == ["0", "1", "2", "3", "4", "...", "16", "17", "18", "19", "20"]
    assert len(rows_of(succeed("shards", "digits", "--num-clients", 20).out)) == 20
    given = ("--num-clients", 2, "--sharding", "non_iid", "--nc", 1, "--allow-missing-classes")
    said = succeed(*TASK, *given, "--out", tmp_path / "o").out
    assert 'left out: 16 samples of "right"' in said
    assert json.loads((tmp_path / "o" / "shards.json").read_text())["left_out"] == [0, 0, 16]
    page = (tmp_path / "o" / "report.html").read_text()
    assert "Left out with all their examples: right." in page


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ("--sharding noniid", 'sharding: unknown "noniid"; did you mean "non_iid"?'),
        ("--alpha 1", "alpha is of sharding dirichlet, not of iid"),
        ("--num-clients 2 --sharding non_iid --nc 1", "cannot hold all 3 classes"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(options: str, told: str, tmp_path: Path):
    assert told in refusal(tmp_path, *TASK, *options.split(), "--out", tmp_path / "out")
