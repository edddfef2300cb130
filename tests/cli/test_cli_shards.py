"""`deltafl shards` from the outside."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from deltafl.cli.shards import shards
from deltafl.errors import DeltaflError
from deltafl.federated.sharding import ShardingRecipe, shard
from deltafl.seeding import keyed_generator
from deltafl.tasks import ImageInput, load_task

TASK = ("tiny_models:tiny_task_factory", "--channels", "1")


def run(*arguments: object, ok: bool = True) -> Result:
    result = CliRunner().invoke(shards, [str(a) for a in arguments])
    if ok and result.exception:
        raise result.exception
    return result


def rows_of(said: str) -> list[list[str]]:
    return [
        line.split()
        for line in said.split("---\n")[-1].splitlines()
        if line and not line.startswith("report")
    ]


def test_the_table_and_the_file_tell_what_the_library_gives(tmp_path: Path):
    out = tmp_path / "out"
    said = run(
        "digits", "--num-clients", 10, "--sharding", "non_iid", "--nc", 2, "--seed", 3, "--out", out
    ).output
    labels = load_task("digits", ImageInput(8), 3).groups("train")
    recipe = ShardingRecipe.of(num_clients=10, sharding="non_iid", nc=2)
    expected = shard(labels, recipe, keyed_generator(3, "shards"))
    held = json.loads((out / "shards.json").read_text())
    assert held["positions"] == [rows.tolist() for rows in expected]
    assert held["sharding"] == {"name": "non_iid", "nc": 2}
    assert (held["task"], held["seed"], held["num_clients"], held["duplicates"]) == (
        "digits",
        3,
        10,
        0,
    )
    assert "10 clients, 600 samples; 59 to 61 a client, of 2 classes" in said
    for client, (row, rows) in enumerate(zip(rows_of(said), expected, strict=True)):
        classes = sorted(set(labels[rows].tolist()))
        assert row == [str(client), str(len(rows)), "2", f'"{classes[0]}",', f'"{classes[1]}"']
    assert sorted(f.name for f in out.iterdir()) == ["figure.png", "report.html", "shards.json"]
    assert (out / "figure.png").read_bytes().startswith(b"\x89PNG\r\n")
    assert str(out / "report.html") in said


def test_many_clients_are_told_by_the_first_and_the_last():
    clients = [row[0] for row in rows_of(run("digits", "--num-clients", 21).output)]
    assert clients == ["0", "1", "2", "3", "4", "...", "16", "17", "18", "19", "20"]
    assert len(rows_of(run("digits", "--num-clients", 20).output)) == 20


def test_left_out_classes_are_told(tmp_path: Path):
    said = run(
        *TASK,
        "--num-clients",
        2,
        "--sharding",
        "non_iid",
        "--nc",
        1,
        "--allow-missing-classes",
        "--out",
        tmp_path / "o",
    ).output
    assert 'left out: 16 samples of "right"' in said
    assert json.loads((tmp_path / "o" / "shards.json").read_text())["left_out"] == [0, 0, 16]
    assert (
        "Left out with all their examples: right." in (tmp_path / "o" / "report.html").read_text()
    )


def test_the_seed_decides_and_options_reach_the_sharding(tmp_path: Path):
    def positions(name: str, *arguments: object) -> list[list[int]]:
        run(
            *TASK,
            "--num-clients",
            4,
            "--sharding",
            "dirichlet",
            *arguments,
            "--out",
            tmp_path / name,
        )
        return json.loads((tmp_path / name / "shards.json").read_text())["positions"]

    base = positions("a", "--alpha", 1)
    assert positions("b", "--alpha", 1) == base
    assert positions("c", "--alpha", 1, "--seed", 1) != base
    assert sorted(map(len, base)) == [12, 12, 13, 13]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sharding", "noniid"], 'sharding: unknown "noniid"; did you mean "non_iid"?'),
        (["--sharding", "non_iid"], "sharding non_iid needs nc"),
        (["--alpha", "1"], "alpha is of sharding dirichlet, not of iid"),
        (
            ["--sharding", "dirichlet", "--alpha", "1", "--allow-missing-classes"],
            "allow_missing_classes is of sharding non_iid",
        ),
        (["--num-clients", "51"], "there are 50 samples"),
        (["--num-clients", "2", "--sharding", "non_iid", "--nc", "1"], "cannot hold all 3 classes"),
    ],
)
def test_mistakes_are_told_and_nothing_is_written(
    arguments: list[str], message: str, tmp_path: Path
):
    result = run(*TASK, *arguments, "--out", tmp_path / "out", ok=False)
    assert isinstance(result.exception, DeltaflError), result.exception
    assert message in str(result.exception)
    assert not list(tmp_path.iterdir())


def test_an_output_is_kept_unless_told_otherwise(tmp_path: Path):
    out = tmp_path / "out"
    run(*TASK, "--num-clients", 3, "--out", out)
    before = (out / "shards.json").read_bytes()
    refused = run(*TASK, "--num-clients", 4, "--out", out, ok=False)
    assert "--overwrite" in str(refused.exception)
    assert (out / "shards.json").read_bytes() == before
    run(*TASK, "--num-clients", 4, "--out", out, "--overwrite")
    assert json.loads((out / "shards.json").read_text())["num_clients"] == 4
