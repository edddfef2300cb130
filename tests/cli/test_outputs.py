"""What all commands do alike: `--dry-run` prints a file that can be read again, and no folder is replaced unasked."""

from pathlib import Path

import pytest
import yaml

from checkpoint_files import files_in, make_world, refusal, succeed
from tiny_models import vit_file

MODEL = ("--model", vit_file(num_hidden_layers=1), "--data", "digits")
TRAINING = {
    "finetune": (*MODEL, "--steps", 3),
    "centralized": (*MODEL, "--epochs", 2),
    "federate": (*MODEL, "--sparsity-ratio", 0.5, "--aggregator", "fedgma", "--rho", 0.6),
    "mask": (*MODEL, "--sparsity-ratio", 0.5),
    "suite": ("heterogeneity", *MODEL, "--nc-values", 2, 5),
    "quickstart": ("--seed", 3),
}


@pytest.mark.parametrize("command", TRAINING)
def test_a_dry_run_prints_the_settings_and_they_can_be_read_again(command: str, tmp_path: Path):
    options = (*TRAINING[command], "--out", tmp_path / "out", "--dry-run")
    said = succeed(command, *options).out
    assert yaml.safe_load(said)["out"] == str(tmp_path / "out")
    assert files_in(tmp_path) == {}
    (tmp_path / "r.yaml").write_text(said)
    names = ("heterogeneity",) if command == "suite" else ()
    assert succeed(command, *names, "--config", tmp_path / "r.yaml", "--dry-run").out == said


@pytest.mark.parametrize("command", ["finetune", "centralized", "federate"])
def test_a_dry_run_finds_mistakes(command: str, tmp_path: Path):
    wrong = ("--model", "no/such/model", "--data", "digits", "--out", tmp_path / "out")
    steps = ("--steps", 1) if command == "finetune" else ()
    assert "no/such/model" in refusal(tmp_path, command, *wrong, *steps, "--dry-run")


def others(root: Path) -> dict[str, tuple[object, ...]]:
    """The options of commands that take fine-tunes, which are made, or no model."""
    world = make_world(root)
    data = zip(("m0", "m1"), ("digits:thick", "digits:thin"), strict=True)
    entries = [{"path": str(root / name), "data": d} for name, d in data]
    recipe = {"base": str(root / "base"), "models": entries}
    (root / "r.yaml").write_text(yaml.safe_dump(recipe))
    merged = tuple(world.args[1:-2])
    search, shards = (root / "r.yaml",), ("digits", "--num-clients", 3)
    return {"merge": merged, "inspect": merged, "search": search, "shards": shards}


@pytest.mark.parametrize("command", [*TRAINING, "merge", "inspect", "search", "shards"])
def test_a_folder_that_is_there_is_left_as_it_is(command: str, tmp_path: Path):
    """Without --overwrite any folder, and with it one that is no output of ours."""
    options, out = (TRAINING | others(tmp_path))[command], tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text("precious")
    called = (command, *options, "--out", out)
    problem = refusal(tmp_path, *called)
    if command != "suite":
        assert problem == f'"{out}" exists; choose another --out, or replace it with --overwrite'
        assert "does not look like a model or a run" in refusal(tmp_path, *called, "--overwrite")
