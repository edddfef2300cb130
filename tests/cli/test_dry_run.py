"""`--dry-run`: everything is checked, all settings are printed as a file, and nothing is written."""

from pathlib import Path

import pytest
import yaml

from checkpoint_files import files_in, refusal, succeed
from tiny_models import vit_file

MODEL = ("--model", vit_file(num_hidden_layers=1), "--data", "digits")
COMMANDS = {
    "finetune": (*MODEL, "--steps", 3),
    "centralized": (*MODEL, "--epochs", 2),
    "federate": (*MODEL, "--sparsity-ratio", 0.5, "--aggregator", "fedgma", "--rho", 0.6),
    "mask": (*MODEL, "--sparsity-ratio", 0.5),
    "suite": ("heterogeneity", *MODEL, "--nc-values", 2, 5),
    "quickstart": ("--seed", 3),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_the_settings_are_printed_and_can_be_read_again(command: str, tmp_path: Path) -> None:
    options = (*COMMANDS[command], "--out", tmp_path / "out", "--dry-run")
    said = succeed(command, *options).out
    assert yaml.safe_load(said)["out"] == str(tmp_path / "out")
    assert files_in(tmp_path) == {}
    (tmp_path / "r.yaml").write_text(said)
    names = ("heterogeneity",) if command == "suite" else ()
    assert succeed(command, *names, "--config", tmp_path / "r.yaml", "--dry-run").out == said


@pytest.mark.parametrize("command", ["finetune", "centralized", "federate"])
def test_a_mistake_is_found_before_anything_is_done(command: str, tmp_path: Path) -> None:
    wrong = ("--model", "no/such/model", "--data", "digits", "--out", tmp_path / "out")
    steps = ("--steps", 1) if command == "finetune" else ()
    assert "no/such/model" in refusal(tmp_path, command, *wrong, *steps, "--dry-run")
