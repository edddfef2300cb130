import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from deltafl.cli.evaluate import evaluate
from deltafl.cli.finetune import finetune
from deltafl.errors import DeltaflError
from deltafl.models import load_net
from deltafl.tasks import load_task
from deltafl.training import TrainingRecipe
from deltafl.training import finetune as finetune_model
from tiny_models import judged, tiny_llama, tiny_net, write_lines

TASK = "tiny_models:tiny_task_factory"


def run(command, *arguments: object, ok: bool = True):
    result = CliRunner().invoke(command, [str(a) for a in arguments])
    if ok and result.exception:
        raise result.exception
    return result


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    folder.mkdir()
    tiny_net().save(folder)
    return folder


def test_options_mean_what_the_library_means(base: Path, tmp_path: Path):
    out = tmp_path / "out"
    said = run(
        finetune, "--base", base, "--data", TASK, "--out", out, "--steps", 6, "--lr", 1e-3, "--batch-size", 8,
        "--weight-decay", 0, "--warmup", 2, "--label-smoothing", 0.1, "--few-shot", 2, "--seed", 4, "--device", "cpu",
    )  # fmt: skip
    recipe = TrainingRecipe.of(
        model=str(base), data=TASK, steps=6, lr=1e-3, batch_size=8, weight_decay=0.0, warmup=2, label_smoothing=0.1,
        few_shot=2, seed=4, device="cpu", out=str(tmp_path / "direct"),
    )  # fmt: skip
    net = load_net(base)
    finetune_model(net, load_task(recipe.data, net.inputs, 4), recipe)
    for file in ("model.safetensors", "head.safetensors", "training.json"):
        assert (out / file).read_bytes() == (tmp_path / "direct" / file).read_bytes()
    assert "6 steps" in said.output
    short = ("--model", base, "--data", TASK, "--out", out, "--steps", 1, "--overwrite", "--quiet")
    assert run(finetune, *short).output == ""


def test_options_go_before_the_file(base: Path, tmp_path: Path):
    config = tmp_path / "c.yaml"
    config.write_text(
        f"model: {base}\ndata: {TASK}\nout: {tmp_path / 'out'}\nepochs: 3\nlr: 0.5\nbatch_size: 7\n"
    )
    run(finetune, "--config", config, "--steps", 2, "--lr", 1e-3)
    recorded = json.loads((tmp_path / "out" / "training.json").read_text())["config"]
    given = ("steps", "epochs", "lr", "batch_size", "weight_decay")
    assert tuple(recorded[key] for key in given) == (2, None, 1e-3, 7, 0.1)


def test_evaluate_prints_and_writes_every_model(base: Path, tmp_path: Path):
    models = [tmp_path / "m0", tmp_path / "m1"]
    for seed, model in enumerate(models):
        tune = ("--base", base, "--data", TASK, "--steps", 3, "--seed", seed)
        run(finetune, *tune, "--out", model)
    file, shared = tmp_path / "x.json", ("--models", *models, "--data", TASK)
    said = run(evaluate, *shared, "--split", "val", "--json", file)
    written = json.loads(file.read_text())
    assert (written["metric"], written["split"]) == ("accuracy", "val")
    for row, model in zip(written["results"], models, strict=True):
        expected = judged(model, TASK, "val")
        assert (row["model"], row["score"], row["examples"]) == (str(model), expected.score, 20)
        assert row["scores"] == expected.scores.tolist()
        assert f"{expected.score:.2%}" in said.output
    head = ("--models", base, "--data", TASK, "--head", models[0] / "head.safetensors")
    assert "test accuracy" in run(evaluate, *head).output
    assert run(evaluate, *head, "--quiet").output == ""


def test_a_language_model_is_fine_tuned_and_evaluated(tmp_path: Path):
    tiny_llama(tmp_path / "llama")
    lines, out = write_lines(tmp_path / "lines"), tmp_path / "out"
    data = ("--data", lines, "--device", "cpu")
    said = run(
        finetune, "--model", tmp_path / "llama" / "config.json", *data, "--out", out, "--epochs", 2, "--lr", 1e-2,
        "--batch-size", 8,
    ).output  # fmt: skip
    facts = json.loads((out / "training.json").read_text())
    assert f"log-likelihood {facts['val_score']:.4f} of" in said
    said = run(evaluate, "--models", out, *data, "--split", "val").output
    assert "val log-likelihood" in said
    assert f"{facts['val_score']:.4f}" in said


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
    config.write_text(
        "base: b\ndata: d\nout: o\nsteps: 1\nbatchsize: 3\nlr: fast\nschedule: step\n"
    )
    result = run(finetune, "--config", config, ok=False)
    assert isinstance(result.exception, DeltaflError)
    for told in (
        '"base" is now "model"',
        '"schedule" is now "lr_schedule"',
        'unknown key "batchsize"; did you mean "batch_size"',
        "'fast'",
    ):
        assert told in str(result.exception)


def test_an_output_is_kept_unless_told_otherwise(base: Path, tmp_path: Path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "training.json").write_text("{}")
    result = run(finetune, "--base", base, "--data", TASK, "--out", out, "--steps", 1, ok=False)
    assert "--overwrite" in str(result.exception)
    assert (out / "training.json").read_text() == "{}"


def test_evaluate_without_a_head_or_a_readable_seed(base: Path):
    result = run(evaluate, "--models", base, "--data", TASK, ok=False)
    assert isinstance(result.exception, DeltaflError)
    assert "--head" in str(result.exception)
    (base / "training.json").write_text("[]")
    result = run(evaluate, "--models", base, "--data", TASK, ok=False)
    assert isinstance(result.exception, DeltaflError)
    assert "--seed" in str(result.exception)
