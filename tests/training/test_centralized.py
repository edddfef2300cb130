"""Centralised training against a plain loop, killed and resumed, and from the command line."""

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner, Result
from safetensors.torch import load_file
from torch import nn

from deltafl.cli.finetune import centralized
from deltafl.errors import DeltaflError
from deltafl.models import load_net
from deltafl.progress import OnProgress, Progress
from deltafl.seeding import keyed_generator
from deltafl.tasks import ImageTask, load_task
from deltafl.tasks.images import Images
from deltafl.training import CentralizedRecipe, centralize, evaluate, loop
from deltafl.training import centralized as baseline
from deltafl.training.record import FinishedRun, without_timings
from deltafl.training.step import batch_ids, scores
from tiny_models import NAMES, tiny_images, tiny_llama, tiny_net, vit_file, write_lines

RECIPE = CentralizedRecipe.of(
    model="tiny", data="halves", epochs=3.0, lr=0.02, batch_size=16, head="linear", train_head=True, seed=7,
    device="cpu",
)  # fmt: skip
PER_EPOCH = 4  # 50 examples in batches of 16
TASK = "tiny_models:tiny_task_factory"

SCRIPT = """
import os, signal, sys
from tiny_models import tiny_images, tiny_net
from deltafl.training import CentralizedRecipe, centralize

def kill(progress):
    if progress.name == "steps" and progress.done == int(os.environ.get("KILL_AT", 0)):
        os.kill(os.getpid(), signal.SIGKILL)

recipe = CentralizedRecipe.model_validate_json(sys.argv[1])
centralize(tiny_net(), tiny_images(), recipe, resume=True, on_progress=kill)
"""


class StoppedError(Exception):
    pass


def stop_at(name: str, done: int) -> OnProgress:
    def stop(progress: Progress) -> None:
        if (progress.name, progress.done) == (name, done):
            raise StoppedError

    return stop


def run(recipe: CentralizedRecipe, out: Path, **how: Any) -> FinishedRun:
    data = recipe.data
    task = ImageTask("halves", tiny_images().splits, NAMES, data.augment, data.label_smoothing)
    return centralize(tiny_net(), task, recipe.replace(out=str(out)), **how)


def script(*launcher: str, recipe: CentralizedRecipe, **environment: str) -> Any:
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *(launcher or ("-c", SCRIPT)), recipe.model_dump_json()],
        env=env | environment,
        capture_output=True,
        text=True,
    )


def weights(out: Path) -> dict[str, torch.Tensor]:
    model = out / "model"
    return load_file(model / "model.safetensors") | load_file(model / "head.safetensors")


def assert_same(a: Path, b: Path) -> None:
    ours, theirs = weights(a), weights(b)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    rows = [
        [json.loads(line) for line in (out / "record.jsonl").read_text().splitlines()]
        for out in (a, b)
    ]
    assert without_timings(rows[0]) == without_timings(rows[1])
    results = [json.loads((out / "result.json").read_text()) for out in (a, b)]
    assert without_timings(results[:1]) == without_timings(results[1:])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of RECIPE that nothing stopped."""
    out = tmp_path_factory.mktemp("whole") / "run"
    run(RECIPE, out)
    return out


@pytest.mark.parametrize("nesterov", [False, True])
def test_a_run_is_a_plain_loop(nesterov: bool, tmp_path: Path):
    """The reference shares the network, the order of examples and the head's start, and no code of training."""
    recipe = RECIPE.replace(
        nesterov=nesterov, weight_decay=0.01, label_smoothing=0.1, warmup=2, grad_clip=0.5
    )
    done = run(recipe, tmp_path / "run")
    data, net = tiny_images().splits, tiny_net()
    encoder = net.module.get_submodule("encoder")
    start = keyed_generator(7, "head")
    weight = nn.Parameter(torch.empty(3, 16).uniform_(-0.25, 0.25, generator=start))
    bias = nn.Parameter(torch.zeros(3))
    parameters = [*encoder.parameters(), weight, bias]
    optimiser = torch.optim.SGD(parameters, 1.0, momentum=0.9, weight_decay=0.01, nesterov=nesterov)

    def logits(split: Images) -> torch.Tensor:
        return net.module.features(split.images) @ weight.T + bias

    accuracies, losses, held = [], [], []
    for epoch in range(4):
        encoder.eval()
        with torch.no_grad():
            right = logits(data["val"]).argmax(1) == data["val"].labels
            accuracies.append(right.double().mean().item())
        held.append({n: p.detach().clone() for n, p in encoder.named_parameters()})
        encoder.train()
        total = 0.0
        for step in range(PER_EPOCH * epoch, PER_EPOCH * (epoch + 1)):
            if epoch == 3:
                break
            batch = data["train"].at(batch_ids(50, 16, 7, step))
            loss = nn.functional.cross_entropy(logits(batch), batch.labels, label_smoothing=0.1)
            optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 0.5)
            rate = (
                0.01 * (step + 1) if step < 2 else 0.01 * (1 + math.cos(math.pi * (step - 2) / 10))
            )
            optimiser.param_groups[0]["lr"] = rate
            optimiser.step()
            total += loss.item() * len(batch)
        losses.append(total / 50)
    assert [row["val_score"] for row in done.rows] == pytest.approx(accuracies)
    assert [row["train_loss"] for row in done.rows[1:]] == pytest.approx(losses[:3], rel=1e-4)
    assert done.rows[-1]["lr"] == pytest.approx(rate)
    chosen = accuracies.index(max(accuracies))
    assert done.result["best_epoch"] == chosen > 0
    ours = load_net(tmp_path / "run" / "model").trained
    for name, tensor in held[chosen].items():
        torch.testing.assert_close(ours[f"encoder.{name}"], tensor, rtol=1e-4, atol=2e-6)


def test_what_a_run_leaves(whole: Path):
    left = {p.name for p in whole.iterdir()}
    assert left == {"config.yaml", "record.jsonl", "result.json", "model"}
    result = json.loads((whole / "result.json").read_text())
    rows = [json.loads(line) for line in (whole / "record.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [0, 1, 2, 3]
    accuracies = [row["val_score"] for row in rows]
    assert result["best_epoch"] == accuracies.index(max(accuracies))
    assert (result["metric"], result["ratio_scaled"]) == ("accuracy", True)
    net = load_net(whole / "model")
    for split, key in (("test", "test_score"), ("val", "val_score")):
        assert evaluate(net, tiny_images(), split, device="cpu").score == result[key]
    facts = json.loads((whole / "model" / "training.json").read_text())
    expected = {"num_steps": PER_EPOCH * result["best_epoch"], "num_examples": 50, "lr": 0.02}
    expected |= {"momentum": 0.9, "epochs": result["best_epoch"], "val_score": max(accuracies)}
    assert {key: facts[key] for key in expected} == expected
    assert yaml.safe_load((whole / "config.yaml").read_text())["epochs"] == 3


def test_the_test_examples_are_used_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    seen: list[str] = []
    for module in (loop, baseline):
        monkeypatch.setattr(module, "scores", lambda *a, **k: seen.append(a[2]) or scores(*a, **k))
    run(RECIPE.replace(epochs=2.0), tmp_path / "run")
    assert seen == ["val", "val", "val", "test"]


def test_a_language_model_is_trained_by_the_same_loop(tmp_path: Path):
    net, lines = tiny_llama(tmp_path / "llama"), write_lines(tmp_path / "lines")
    task = load_task(str(lines), net.inputs)
    recipe = CentralizedRecipe.of(
        model="llama", data=str(lines), epochs=4.0, lr=0.5, patience=3, out=str(tmp_path / "whole")
    )
    done = centralize(net, task, recipe)
    values = [row["val_score"] for row in done.rows]
    assert all(value < 0 for value in values)
    assert done.result["val_score"] == max(values) > values[0]
    assert (done.result["metric"], done.result["ratio_scaled"]) == ("log-likelihood", False)
    assert done.result["test_score"] == pytest.approx(
        evaluate(load_net(done.out / "model"), task).score, abs=1e-6
    )
    cut = recipe.replace(out=str(tmp_path / "cut"))
    with pytest.raises(StoppedError):
        centralize(net, task, cut, on_progress=stop_at("epochs", 3))
    assert centralize(net, task, cut, resume=True).result["test_score"] == done.result["test_score"]


def test_a_killed_run_resumes_to_the_same_bits(whole: Path, tmp_path: Path):
    out = tmp_path / "run"
    killed = script(recipe=RECIPE.replace(save_every=3, out=str(out)), KILL_AT="7")
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert (out / "state" / "state.pt").is_file()
    assert not (out / "result.json").exists()
    run(RECIPE, out, resume=True)
    assert_same(out, whole)
    assert not (out / "state").exists()


@pytest.mark.parametrize("save_every", [0, 3])
def test_stopped_anywhere_and_again_it_resumes_to_the_same_bits(
    whole: Path, save_every: int, tmp_path: Path
):
    """After each step in turn; the state on disk is then up to four steps old, or there is none."""
    out, recipe = tmp_path / "run", RECIPE.replace(save_every=save_every)
    for point in range(1, 13):
        with pytest.raises(StoppedError):
            run(recipe, out, resume=True, on_progress=stop_at("steps", point))
    run(recipe, out, resume=True)
    assert_same(out, whole)


@pytest.mark.parametrize("epoch", [0, 1, 3])
def test_stopped_between_a_row_and_its_state_no_row_comes_twice(
    whole: Path, epoch: int, tmp_path: Path
):
    with pytest.raises(StoppedError):
        run(RECIPE, tmp_path / "run", on_progress=stop_at("epochs", epoch))
    run(RECIPE, tmp_path / "run", resume=True)
    assert_same(tmp_path / "run", whole)


def test_a_run_killed_before_its_record_begins_starts_anew(tmp_path: Path):
    out = tmp_path / "run"
    out.mkdir()
    (out / ".config.yaml.0a1b2c3d.tmp").write_text("epo")
    (out / "config.yaml").write_text("epochs: 1\n")
    assert run(RECIPE.replace(epochs=1.0), out, resume=True).result["epochs"] == 1
    assert not list(out.glob(".*"))
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("mine")
    with pytest.raises(DeltaflError, match="exists"):
        run(RECIPE, other, resume=True)


def test_a_finished_run_is_returned_and_another_refused(whole: Path):
    before = {p: p.read_bytes() for p in whole.rglob("*") if p.is_file()}
    again = run(RECIPE, whole, resume=True)
    assert again.result == json.loads((whole / "result.json").read_text())
    with pytest.raises(DeltaflError) as refused:
        run(RECIPE.replace(lr=0.5, momentum=0.0), whole, resume=True)
    assert "lr = 0.02, now it is 0.5" in refused.value.problems[0]
    assert "momentum = 0.9, now it is 0.0" in refused.value.problems[1]
    with pytest.raises(DeltaflError, match="--overwrite"):
        run(RECIPE, whole)
    assert {p: p.read_bytes() for p in whole.rglob("*") if p.is_file()} == before


def test_a_torn_state_is_refused(tmp_path: Path):
    out = tmp_path / "run"
    with pytest.raises(StoppedError):
        run(RECIPE, out, on_progress=stop_at("steps", PER_EPOCH))
    file = out / "state" / "state.pt"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(DeltaflError, match="is not the state of a run"):
        run(RECIPE, out, resume=True)


@pytest.mark.slow
def test_two_processes_are_one_up_to_rounding(tmp_path: Path):
    """50 examples in batches of 16 leave a last batch of 2: one example for each process."""
    file = tmp_path / "script.py"
    file.write_text(
        SCRIPT.replace("tiny_images()", "__import__('dataclasses').replace(tiny_images(), augment='crop_flip')")
        + "\nfrom accelerate import PartialState\nprint(f'<{PartialState().num_processes}>')\n"
    )  # fmt: skip
    recipe = RECIPE.replace(augment="crop_flip", patience=2)
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(file))
    two = script(*launch, recipe=recipe.replace(out=str(tmp_path / "two")))
    assert two.returncode == 0, two.stderr
    assert two.stdout.count("<2>") == 2
    one = run(recipe, tmp_path / "one")
    rows = [
        json.loads(line) for line in (tmp_path / "two" / "record.jsonl").read_text().splitlines()
    ]
    assert [row["val_score"] for row in rows] == [row["val_score"] for row in one.rows]
    for name, tensor in weights(tmp_path / "one").items():
        torch.testing.assert_close(weights(tmp_path / "two")[name], tensor, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("augment", ["none", "crop_flip"])
def test_a_run_without_gain_stops_early_and_validation_is_not_augmented(
    augment: str, tmp_path: Path
):
    """At a rate of 1e-12 the model stays as it is, and so must its accuracy on the same images."""
    recipe = RECIPE.replace(lr=1e-12, epochs=9.0, patience=2, augment=augment)
    done = run(recipe, tmp_path / "run")
    assert [row["epoch"] for row in done.rows] == [0, 1, 2]
    assert len({row["val_score"] for row in done.rows}) == 1
    found = (done.result["best_epoch"], done.result["epochs"], done.result["stopped_early"])
    assert found == (0, 2, True)
    with pytest.raises(StoppedError):
        run(recipe, tmp_path / "cut", on_progress=stop_at("epochs", 2))
    run(recipe, tmp_path / "cut", resume=True)
    assert_same(tmp_path / "cut", tmp_path / "run")


def test_augmentation_changes_training_images_by_seed_and_step(whole: Path, tmp_path: Path):
    rows = (whole / "record.jsonl").read_text().splitlines()
    losses = {"none": json.loads(rows[1])["train_loss"]}
    for augment in ("flip", "crop_flip", "flip"):
        recipe = RECIPE.replace(epochs=1.0, augment=augment)
        loss = run(recipe, tmp_path / f"{augment}{len(losses)}").rows[1]["train_loss"]
        assert losses.setdefault(augment, loss) == loss
    assert len(set(losses.values())) == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 0.0}, "epochs: must be greater than 0"),
        ({"lr": 0.0}, "lr: must be greater than 0"),
        ({"lr_schedule": "cosin"}, 'lr_schedule: unknown "cosin"; did you mean "cosine"'),
        ({"augment": "flop"}, 'data.augment: unknown "flop"'),
        ({"patience": 0}, "patience: must be greater than or equal to 1"),
        ({"nesterov": True, "momentum": 0.0}, "nesterov needs a momentum"),
        ({"head": "nowhere.safetensors"}, "nowhere.safetensors"),
        ({"lr": 1e30, "grad_clip": None}, "training diverged"),
    ],
)
def test_mistakes_are_one_clear_line(change: dict[str, Any], message: str, tmp_path: Path):
    with pytest.raises(DeltaflError) as caught:
        run(RECIPE.replace(**change), tmp_path / "run")
    assert message in str(caught.value)


def cli(*arguments: object, ok: bool = True) -> Result:
    result = CliRunner().invoke(centralized, [str(a) for a in arguments])
    if ok and result.exception:
        raise result.exception
    return result


def test_options_mean_what_the_library_means(tmp_path: Path):
    out, config = tmp_path / "out", tmp_path / "c.yaml"
    config.write_text(f"model: {vit_file()}\ndata: {TASK}\nepochs: 9\nlr: 5e-2\nseed: 7\n")
    given = ("--epochs", 2, "--batch-size", 16, "--head", "linear", "--train-head", "--lr-schedule", "linear",
             "--augment", "flip", "--patience", 4, "--device", "cpu")  # fmt: skip
    said = cli("--config", config, "--out", out, *given).output
    recipe = RECIPE.replace(
        model=vit_file(), data=TASK, epochs=2.0, lr=5e-2, lr_schedule="linear", augment="flip", patience=4
    )  # fmt: skip
    direct = run(recipe, tmp_path / "direct")
    assert_same(out, tmp_path / "direct")
    for row in direct.rows:
        assert f"epoch {row['epoch']}/2: " in said
        assert f"validation {row['val_score']:.2%}" in said
    assert f"{direct.result['test_score']:.2%} of 31" in said
    assert (out / "figure.png").read_bytes().startswith(b"\x89PNG\r\n")
    page = (out / "report.html").read_text()
    assert page.count("<svg") == 2
    assert f"epoch {direct.result['best_epoch']})" in page
    assert cli("--config", config, "--out", out, *given, "--resume", "--quiet").output == ""


def test_mistakes_of_the_command_leave_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    out, model = tmp_path / "out", vit_file()
    for arguments, message in (
        (["--data", TASK], "model is missing; name it with --model"),
        (["--model", model, "--data", TASK, "--lr-schedule", "steps"], 'did you mean "step"'),
    ):
        result = cli(*arguments, "--out", out, ok=False)
        assert isinstance(result.exception, DeltaflError)
        assert message in str(result.exception)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    result = cli("--model", model, "--data", TASK, "--out", out, "--tensorboard", ok=False)
    assert "tensorboard is not installed" in str(result.exception)
    assert not list(tmp_path.iterdir())
