import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from deltafl.cli.train import evaluate, finetune
from deltafl.errors import DeltaflError
from deltafl.models import load_encoder, save_encoder
from deltafl.training import FinetuneRecipe
from deltafl.training import evaluate as evaluate_model
from deltafl.training import finetune as finetune_model
from tiny_models import tiny_task, tiny_vit

TASK = "tiny_models:tiny_task_factory"


def run(command, *arguments: str, ok: bool = True):
    result = CliRunner().invoke(command, [str(a) for a in arguments])
    if ok and result.exception:
        raise result.exception
    return result


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    folder.mkdir()
    save_encoder(tiny_vit(), folder)
    return folder


def test_options_mean_what_the_library_means(base: Path, tmp_path: Path):
    out = tmp_path / "out"
    said = run(
        finetune, "--base", base, "--data", TASK, "--out", out, "--steps", 6, "--lr", 1e-3, "--batch-size", 8,
        "--weight-decay", 0, "--warmup", 2, "--label-smoothing", 0.1, "--few-shot", 2, "--seed", 4, "--device", "cpu",
    )  # fmt: skip
    recipe = FinetuneRecipe(
        steps=6,
        lr=1e-3,
        batch_size=8,
        weight_decay=0.0,
        warmup=2,
        label_smoothing=0.1,
        few_shot=2,
        seed=4,
    )
    finetune_model(load_encoder(base), tiny_task(), recipe, tmp_path / "direct", device="cpu")
    for file in ("model.safetensors", "head.safetensors", "training.json"):
        assert (out / file).read_bytes() == (tmp_path / "direct" / file).read_bytes()
    assert "6 steps" in said.output
    quiet = run(
        finetune,
        "--base",
        base,
        "--data",
        TASK,
        "--out",
        out,
        "--steps",
        1,
        "--overwrite",
        "--quiet",
    )
    assert quiet.output == ""


def test_options_go_before_the_file(base: Path, tmp_path: Path):
    config = tmp_path / "c.yaml"
    config.write_text(
        f"base: {base}\ndata: {TASK}\nout: {tmp_path / 'out'}\nepochs: 3\nlr: 0.5\nbatch_size: 7\n"
    )
    run(finetune, "--config", config, "--steps", 2, "--lr", 1e-3)
    recorded = json.loads((tmp_path / "out" / "training.json").read_text())["config"]
    given = ("steps", "epochs", "lr", "batch_size", "weight_decay")
    assert tuple(recorded[key] for key in given) == (2, None, 1e-3, 7, 0.1)


def test_evaluate_prints_and_writes_every_model(base: Path, tmp_path: Path):
    for seed in (0, 1):
        run(
            finetune,
            "--base",
            base,
            "--data",
            TASK,
            "--out",
            tmp_path / f"m{seed}",
            "--steps",
            3,
            "--seed",
            seed,
        )
    models = [tmp_path / "m0", tmp_path / "m1"]
    said = run(
        evaluate,
        "--models",
        *models,
        "--data",
        TASK,
        "--split",
        "val",
        "--json",
        tmp_path / "x.json",
    )
    written = json.loads((tmp_path / "x.json").read_text())
    for row, model in zip(written["results"], models, strict=True):
        expected = evaluate_model(model, tiny_task(), "val")
        assert (row["model"], row["accuracy"], row["n"]) == (str(model), expected.accuracy, 20)
        assert row["correct"] == expected.correct.tolist()
        assert f"{expected.accuracy:.2%}" in said.output
    head = tmp_path / "m0" / "head.safetensors"
    assert "test accuracy" in run(evaluate, "--models", base, "--data", TASK, "--head", head).output
    assert run(evaluate, "--models", base, "--data", TASK, "--head", head, "--quiet").output == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "1", "--base", "no/such", "--data", TASK], "cannot be loaded"),
        (["--steps", "1", "--data", "no_such_data"], "no_such_data"),
        (["--data", TASK], "either steps or epochs"),
        (["--steps", "1", "--optimizer", "sdg", "--data", TASK], 'did you mean "sgd"'),
        (["--steps", "1", "--head", "nohead", "--data", TASK], 'head "nohead" cannot be read'),
        (["--steps", "1"], "data is missing"),
        (["--steps", "1", "--data", TASK, "--config", "no.yaml"], "no.yaml"),
    ],
)
def test_mistakes_are_told_and_nothing_is_written(
    arguments: list[str], message: str, base: Path, tmp_path: Path
):
    given = arguments if "--base" in arguments else [*arguments, "--base", str(base)]
    result = run(finetune, *given, "--out", tmp_path / "out", ok=False)
    assert isinstance(result.exception, DeltaflError), result.exception
    assert message in str(result.exception)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["base"]


def test_mistakes_in_the_file_are_told_at_once(tmp_path: Path):
    config = tmp_path / "c.yaml"
    config.write_text("base: b\ndata: d\nout: o\nbatchsize: 3\nlr: fast\n")
    result = run(finetune, "--config", config, ok=False)
    assert isinstance(result.exception, DeltaflError)
    assert 'unknown key "batchsize"; did you mean "batch_size"' in str(result.exception)
    assert "'fast'" in str(result.exception)


def test_an_output_is_kept_unless_told_otherwise(base: Path, tmp_path: Path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "training.json").write_text("{}")
    result = run(
        finetune, "--base", base, "--data", TASK, "--out", tmp_path / "out", "--steps", 1, ok=False
    )
    assert "--overwrite" in str(result.exception)
    assert (tmp_path / "out" / "training.json").read_text() == "{}"


def test_evaluate_without_a_head_or_a_readable_seed(base: Path):
    result = run(evaluate, "--models", base, "--data", TASK, ok=False)
    assert isinstance(result.exception, DeltaflError)
    assert "--head" in str(result.exception)
    (base / "training.json").write_text("[]")
    result = run(evaluate, "--models", base, "--data", TASK, ok=False)
    assert isinstance(result.exception, DeltaflError)
    assert "--seed" in str(result.exception)
