"""`deltafl finetune` and `deltafl evaluate` from the outside."""

import json
from pathlib import Path

import pytest

from checkpoint_files import refusal, refused, succeed
from deltafl.models import load_net
from deltafl.tasks import load_task
from deltafl.training import TrainingRecipe
from deltafl.training import finetune as finetune_model
from tiny_models import judged, saved, tiny_llama, tiny_net, write_lines

TASK = "tiny_models:tiny_task_factory"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return saved(tiny_net(), tmp_path / "base")


def test_options_mean_what_the_library_means(base: Path, tmp_path: Path):
    out = tmp_path / "out"
    settings = {"steps": 6, "lr": 1e-3, "batch_size": 8, "weight_decay": 0.0, "warmup": 2, "label_smoothing": 0.1,
                "few_shot": 2, "seed": 4, "device": "cpu"}  # fmt: skip
    options = [x for key, value in settings.items() for x in (f"--{key.replace('_', '-')}", value)]
    said = succeed("finetune", "--base", base, "--data", TASK, "--out", out, *options).out
    direct = tmp_path / "direct"
    recipe = TrainingRecipe.of(model=str(base), data=TASK, out=str(direct), **settings)
    net = load_net(base)
    finetune_model(net, load_task(recipe.data, net.inputs, 4), recipe)
    for file in ("model.safetensors", "head.safetensors", "training.json"):
        assert (out / file).read_bytes() == (direct / file).read_bytes()
    assert "6 steps" in said
    short = ("--model", base, "--data", TASK, "--out", out, "--steps", 1, "--overwrite", "--quiet")
    assert succeed("finetune", *short).out == ""


def test_evaluate_prints_and_writes_every_model_and_needs_a_head_and_a_seed(base: Path, tmp_path):
    models = [tmp_path / "m0", tmp_path / "m1"]
    for seed, model in enumerate(models):
        tune = ("--base", base, "--data", TASK, "--steps", 3, "--seed", seed)
        succeed("finetune", *tune, "--out", model)
    shared = ("evaluate", "--models", *models, "--data", TASK)
    said = succeed(*shared, "--split", "val", "--json", tmp_path / "x.json").out
    written = json.loads((tmp_path / "x.json").read_text())
    assert (written["metric"], written["split"]) == ("accuracy", "val")
    for row, model in zip(written["results"], models, strict=True):
        expected = judged(model, TASK, "val")
        assert (row["model"], row["score"], row["examples"]) == (str(model), expected.score, 20)
        assert row["scores"] == expected.scores.tolist()
        assert f"{expected.score:.1%}" in said
    judge = ("evaluate", "--models", base, "--data", TASK)
    head = (*judge, "--head", models[0] / "head.safetensors")
    assert "test accuracy" in succeed(*head).out
    assert succeed(*head, "--quiet").out == ""
    assert "--head" in refusal(base, *judge)
    (base / "training.json").write_text("[]")
    assert "--seed" in refusal(base, *judge)


def test_a_language_model_is_fine_tuned_and_evaluated(tmp_path: Path):
    tiny_llama(tmp_path / "llama")
    lines, out = write_lines(tmp_path / "lines"), tmp_path / "out"
    data = ("--data", lines, "--device", "cpu")
    tune = ("--out", out, "--epochs", 2, "--lr", 1e-2, "--batch-size", 8)
    said = succeed("finetune", "--model", tmp_path / "llama" / "config.json", *data, *tune).out
    facts = json.loads((out / "training.json").read_text())
    assert f"log-likelihood {facts['val_score']:.4g} of" in said
    said = succeed("evaluate", "--models", out, *data, "--split", "val").out
    assert "val log-likelihood" in said
    assert f"{facts['val_score']:.4g}" in said


def test_answers_to_prompts_are_learnt_and_judged_by_name(tmp_path: Path):
    tiny_llama(tmp_path / "llama")
    for split, count in (("train", 40), ("test", 6)):
        some = [{"question": f"{i}+1?", "answer": f"#### {i + 1}"} for i in range(count)]
        file = tmp_path / "in" / f"gsm8k_{split}.jsonl"
        file.parent.mkdir(exist_ok=True)
        file.write_text("\n".join(map(json.dumps, some)))
    data = ("--data", "gsm8k", "--data-dir", tmp_path / "in", "--device", "cpu")
    out = tmp_path / "out"
    tune = ("--out", out, "--steps", 5, "--batch-size", 4, "--max-length", 40)
    succeed("finetune", "--model", tmp_path / "llama" / "config.json", *data, *tune)
    facts = json.loads((out / "training.json").read_text())
    assert (facts["num_examples"], facts["task"], facts["val_examples"]) == (38, "gsm8k", 2)
    assert "test log-likelihood" in succeed("evaluate", "--models", out, *data).out
    exact = ("--score", "exact", "--max-new-tokens", 8)
    said = succeed("evaluate", "--models", out, *data, *exact).out
    assert "test exact match" in said
    assert "0.0%" in said
    message = 'task "humaneval" has 0 val examples'
    stubs = [{"prompt": "def f():", "canonical_solution": " 1"}] * 9
    (tmp_path / "in" / "humaneval.jsonl").write_text("\n".join(map(json.dumps, stubs)))
    stub = ("--data", tmp_path / "in" / "humaneval", "--split", "val")
    assert message in refusal(tmp_path, "evaluate", "--models", out, *stub)
    search = {
        "base": str(out),
        "models": [{"path": str(out), "data": str(tmp_path / "in" / "gsm8k")}],
    }
    (tmp_path / "s.yaml").write_text(
        json.dumps(search | {"methods": ["median"], "metric": "absolute"})
    )
    grid = ("--scaling-coefs", 0.5, 1.0, "--allow-other-base")
    assert "gsm8k" in succeed("search", tmp_path / "s.yaml", *grid).out


MISTAKES = {
    f"--steps 1 --data {TASK} --base no/such": "cannot be loaded",
    "--steps 1 --data no_such_data": "no_such_data",
    f"--data {TASK}": "either steps or epochs",
    "--steps 1": "data is missing",
    f"--steps 1 --data {TASK} --config no.yaml": "no.yaml",
}


@pytest.mark.parametrize(("options", "told"), MISTAKES.items(), ids=str)
def test_a_mistake_is_one_line_and_nothing_is_written(options, told, base, tmp_path):
    call = ("finetune", "--base", base, *options.split(), "--out", tmp_path / "out")
    assert told in refusal(tmp_path, *call)


def test_old_keys_in_the_file_are_told_their_names(tmp_path: Path):
    config = tmp_path / "c.yaml"
    config.write_text("base: b\ndata: d\nout: o\nsteps: 1\nschedule: step")
    problems = "\n".join(refused(tmp_path, "finetune", "--config", config))
    for told in ('"base" is now "model"', '"schedule" is now "lr_schedule"'):
        assert told in problems
