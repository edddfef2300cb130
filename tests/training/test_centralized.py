"""Centralised training against a plain loop, killed and resumed, and from the command line."""

import json
import math
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner, Result
from safetensors.torch import load_file
from torch import nn

from deltafl.cli.centralized import centralized
from deltafl.errors import DeltaflError
from deltafl.models import load_encoder
from deltafl.models.flat import FlatModel
from deltafl.models.heads import load_head, save_head
from deltafl.seeding import keyed_generator
from deltafl.tasks.arrays import Split
from deltafl.training import centralized_best as best
from deltafl.training import evaluate
from deltafl.training import step as training
from deltafl.training.centralized import CentralizedRecipe, CentralizedRun, centralize
from deltafl.training.record import without_timings
from deltafl.training.step import batch_ids
from tiny_models import tiny_head, tiny_task, tiny_vit, vit_file

RECIPE = CentralizedRecipe(epochs=3, lr=0.02, batch_size=16, head="linear", train_head=True, seed=7)
PER_EPOCH = 4  # 50 examples in batches of 16
TASK = "tiny_models:tiny_task_factory"
VIT = vit_file()

SCRIPT = """
import os, signal, sys
from tiny_models import tiny_task, tiny_vit
from deltafl.training.centralized import CentralizedRecipe, centralize

def on_step(done, total):
    if done == int(os.environ.get("KILL_AT", 0)):
        os.kill(os.getpid(), signal.SIGKILL)

recipe = CentralizedRecipe(epochs=3, lr=0.02, batch_size=16, head="linear", train_head=True, seed=7)
centralize(tiny_vit(), tiny_task(), recipe, sys.argv[1], resume=True, save_every=3, device="cpu", on_step=on_step)
"""


class StoppedError(Exception):
    pass


def run(recipe: CentralizedRecipe, out: Path, **settings: Any) -> CentralizedRun:
    return centralize(tiny_vit(), tiny_task(), recipe, out, device="cpu", **settings)


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "model" / "model.safetensors") | load_file(
        out / "model" / "head.safetensors"
    )


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
    recipe = replace(
        RECIPE, nesterov=nesterov, weight_decay=0.01, label_smoothing=0.1, warmup=2, grad_clip=0.5
    )
    done = run(recipe, tmp_path / "run")
    task, encoder = tiny_task(), tiny_vit()
    start = training.keyed_generator(7, "head")
    weight = nn.Parameter(torch.empty(3, 16).uniform_(-0.25, 0.25, generator=start))
    bias = nn.Parameter(torch.zeros(3))
    parameters = [*encoder.module.parameters(), weight, bias]
    optimiser = torch.optim.SGD(parameters, 1.0, momentum=0.9, weight_decay=0.01, nesterov=nesterov)

    def logits(split: Split) -> torch.Tensor:
        return encoder.features(split.images) @ weight.T + bias

    accuracies, losses, held = [], [], []
    for epoch in range(4):
        encoder.module.eval()
        with torch.no_grad():
            accuracies.append(
                (logits(task.val).argmax(1) == task.val.labels).double().mean().item()
            )
        held.append({n: p.detach().clone() for n, p in encoder.module.named_parameters()})
        encoder.module.train()
        total = 0.0
        for step in range(PER_EPOCH * epoch, PER_EPOCH * (epoch + 1)):
            if epoch == 3:
                break
            ids = batch_ids(50, 16, 7, step)
            batch = Split(task.train.images[ids], task.train.labels[ids])
            loss = nn.functional.cross_entropy(logits(batch), batch.labels, label_smoothing=0.1)
            optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 0.5)
            rate = (
                0.01 * (step + 1) if step < 2 else 0.01 * (1 + math.cos(math.pi * (step - 2) / 10))
            )
            optimiser.param_groups[0]["lr"] = rate
            optimiser.step()
            total += loss.item() * len(ids)
        losses.append(total / 50)
    assert [row["val_score"] for row in done.rows] == pytest.approx(accuracies)
    assert [row["train_loss"] for row in done.rows[1:]] == pytest.approx(losses[:3], rel=1e-4)
    assert done.rows[-1]["lr"] == pytest.approx(rate)
    chosen = accuracies.index(max(accuracies))
    assert done.result["best_epoch"] == chosen > 0
    ours = FlatModel(load_encoder(tmp_path / "run" / "model")).tensors()
    for name, tensor in held[chosen].items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-4, atol=2e-6)


def test_what_a_run_leaves(whole: Path):
    assert {p.name for p in whole.iterdir()} == {
        "config.yaml",
        "record.jsonl",
        "result.json",
        "model",
    }
    result = json.loads((whole / "result.json").read_text())
    rows = [json.loads(line) for line in (whole / "record.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [0, 1, 2, 3]
    accuracies = [row["val_score"] for row in rows]
    assert result["best_epoch"] == accuracies.index(max(accuracies))
    model = whole / "model"
    for split, key in (("test", "test_score"), ("val", "val_score")):
        assert evaluate(model, tiny_task(), split, device="cpu").accuracy == result[key]
    facts = json.loads((model / "training.json").read_text())
    expected = {
        "num_steps": PER_EPOCH * result["best_epoch"],
        "num_examples": 50,
        "lr": 0.02,
        "momentum": 0.9,
    }
    assert {key: facts[key] for key in expected} == expected
    assert yaml.safe_load((whole / "config.yaml").read_text())["epochs"] == 3


def test_the_test_images_are_used_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    seen: list[int] = []
    plain = best.predict_correct
    monkeypatch.setattr(
        best, "predict_correct", lambda *a, **k: seen.append(len(a[2])) or plain(*a, **k)
    )
    monkeypatch.setattr(
        "deltafl.training.centralized.predict_correct",
        lambda *a, **k: seen.append(len(a[2])) or plain(*a, **k),
    )
    run(replace(RECIPE, epochs=2), tmp_path / "run")
    assert seen == [20, 20, 20, 31]


def test_a_killed_run_resumes_to_the_same_bits(whole: Path, tmp_path: Path):
    out = tmp_path / "run"
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join(sys.path),
        "OMP_NUM_THREADS": "1",
        "KILL_AT": "7",
    }
    killed = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(out)], env=env, capture_output=True, text=True
    )
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

    def at(point: int) -> Any:
        def stop(done: int, total: int) -> None:
            if done == point:
                raise StoppedError

        return stop

    out = tmp_path / "run"
    for point in range(1, 13):
        with pytest.raises(StoppedError):
            run(RECIPE, out, resume=True, save_every=save_every, on_step=at(point))
    run(RECIPE, out, resume=True)
    assert_same(out, whole)


@pytest.mark.parametrize("epoch", [0, 1, 3])
def test_stopped_between_a_row_and_its_state_no_row_comes_twice(
    whole: Path, epoch: int, tmp_path: Path
):
    def stop(row: Any) -> None:
        if row["epoch"] == epoch:
            raise StoppedError

    with pytest.raises(StoppedError):
        run(RECIPE, tmp_path / "run", on_epoch=stop)
    run(RECIPE, tmp_path / "run", resume=True)
    assert_same(tmp_path / "run", whole)


def test_a_run_killed_before_its_record_begins_starts_anew(tmp_path: Path):
    out = tmp_path / "run"
    out.mkdir()
    (out / ".config.yaml.0a1b2c3d.tmp").write_text("epo")
    (out / "config.yaml").write_text("epochs: 1\n")
    assert run(replace(RECIPE, epochs=1), out, resume=True).result["epochs"] == 1
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
        run(replace(RECIPE, lr=0.5, momentum=0.0), whole, resume=True)
    assert "lr = 0.02, now it is 0.5" in refused.value.problems[0]
    assert "momentum = 0.9, now it is 0.0" in refused.value.problems[1]
    with pytest.raises(DeltaflError, match="--overwrite"):
        run(RECIPE, whole)
    assert {p: p.read_bytes() for p in whole.rglob("*") if p.is_file()} == before


def test_a_torn_state_is_refused(tmp_path: Path):
    out = tmp_path / "run"

    def stop(done: int, total: int) -> None:
        if done == PER_EPOCH:
            raise StoppedError

    with pytest.raises(StoppedError):
        run(RECIPE, out, on_step=stop)
    file = out / "state" / "state.pt"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(DeltaflError, match="is not the state of a run"):
        run(RECIPE, out, resume=True)


@pytest.mark.slow
def test_two_processes_are_one_up_to_rounding(tmp_path: Path):
    """50 examples in batches of 16 leave a last batch of 2: one example for each process."""
    script = tmp_path / "script.py"
    recipe = replace(RECIPE, augment="crop_flip", patience=2)
    script.write_text(
        "import sys\nfrom tiny_models import tiny_task, tiny_vit\nfrom accelerate import PartialState\n"
        "from deltafl.training.centralized import CentralizedRecipe, centralize\n"
        f"centralize(tiny_vit(), tiny_task(), {recipe!r}, sys.argv[1], device='cpu')\n"
        "print(f'<{PartialState().num_processes}>')\n"
    )
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    launch = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        script,
        tmp_path / "two",
    ]
    two = subprocess.run(
        [sys.executable, *map(str, launch)], env=env, capture_output=True, text=True
    )
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
    recipe = replace(RECIPE, lr=1e-12, epochs=9, patience=2, augment=augment)
    done = run(recipe, tmp_path / "run")
    assert [row["epoch"] for row in done.rows] == [0, 1, 2]
    assert len({row["val_score"] for row in done.rows}) == 1
    assert (done.result["best_epoch"], done.result["epochs"], done.result["stopped_early"]) == (
        0,
        2,
        True,
    )

    def stop(row: Any) -> None:
        if row["epoch"] == 2:
            raise StoppedError

    with pytest.raises(StoppedError):
        run(recipe, tmp_path / "cut", on_epoch=stop)
    run(recipe, tmp_path / "cut", resume=True)
    assert_same(tmp_path / "cut", tmp_path / "run")


def test_augmentation_changes_training_images_by_seed_and_step(whole: Path, tmp_path: Path):
    losses = {
        "none": json.loads((whole / "record.jsonl").read_text().splitlines()[1])["train_loss"]
    }
    for name, augment, seed in (("flip", "flip", 7), ("crop", "crop_flip", 7)):
        losses[name] = run(
            replace(RECIPE, epochs=1, augment=augment, seed=seed), tmp_path / name
        ).rows[1]["train_loss"]
    assert len(set(losses.values())) == 3
    again = run(replace(RECIPE, epochs=1, augment="flip"), tmp_path / "again")
    assert again.rows[1]["train_loss"] == losses["flip"]


@pytest.mark.parametrize("head", ["ridge", "probe", "linear", "file"])
def test_heads_stay_as_they_are_unless_trained(head: str, tmp_path: Path):
    if head == "file":
        head = str(tmp_path / "head.safetensors")
        save_head(tiny_head(), Path(head))
    recipe = replace(RECIPE, head=head, epochs=1, lr=1e-4)
    frozen = run(replace(recipe, train_head=False, lr=1e-12), tmp_path / "start")
    start = load_head(tmp_path / "start" / "model" / "head.safetensors")
    run(replace(recipe, train_head=False), tmp_path / "frozen")
    assert torch.equal(
        load_head(tmp_path / "frozen" / "model" / "head.safetensors").weight, start.weight
    )
    if head.endswith("safetensors"):
        assert torch.equal(start.weight, tiny_head().weight)
    if head == "probe":  # trained on the very features, it is far above one in three
        assert frozen.rows[0]["val_score"] > 0.6


def test_a_trained_head_moves(whole: Path):
    model = whole / "model"
    assert json.loads((whole / "result.json").read_text())["best_epoch"] > 0
    start = torch.empty(3, 16).uniform_(-0.25, 0.25, generator=keyed_generator(7, "head"))
    assert not torch.equal(load_head(model / "head.safetensors").weight, start)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 0}, "epochs must be positive, not 0"),
        ({"lr": 0.0}, "lr must be positive"),
        ({"lr_schedule": "cosin"}, 'unknown schedule "cosin"; did you mean "cosine"'),
        ({"augment": "flop"}, 'unknown augment "flop"'),
        ({"patience": 0}, "patience must be 1 or more"),
        ({"nesterov": True, "momentum": 0.0}, "nesterov needs a momentum"),
        ({"head": "nowhere.safetensors"}, "nowhere.safetensors"),
        ({"lr": 1e30, "grad_clip": None}, "training diverged"),
    ],
)
def test_mistakes_are_one_clear_line(change: dict[str, Any], message: str, tmp_path: Path):
    with pytest.raises(DeltaflError, match=message.replace("?", r"\?")):
        run(replace(RECIPE, **change), tmp_path / "run")


def cli(*arguments: object, ok: bool = True) -> Result:
    result = CliRunner().invoke(centralized, [str(a) for a in arguments])
    if ok and result.exception:
        raise result.exception
    return result


def test_options_mean_what_the_library_means(tmp_path: Path):
    out, config = tmp_path / "out", tmp_path / "c.yaml"
    config.write_text(f"model: {VIT}\ndata: {TASK}\nepochs: 9\nlr: 5e-2\nseed: 7\n")
    given = ("--epochs", 2, "--batch-size", 16, "--head", "linear", "--train-head", "--lr-schedule", "linear",
             "--augment", "flip", "--patience", 4, "--device", "cpu")  # fmt: skip
    said = cli("--config", config, "--out", out, *given).output
    recipe = CentralizedRecipe(
        epochs=2, lr=5e-2, batch_size=16, head="linear", train_head=True, lr_schedule="linear", augment="flip",
        patience=4, seed=7,
    )  # fmt: skip
    encoder = load_encoder(VIT)
    direct = centralize(encoder, tiny_task(), recipe, tmp_path / "direct", device="cpu")
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
    out = tmp_path / "out"
    for arguments, message in (
        (["--data", TASK], "model is missing; name it with --model"),
        (["--model", VIT, "--data", TASK, "--lr-schedule", "steps"], 'did you mean "step"'),
    ):
        result = cli(*arguments, "--out", out, ok=False)
        assert isinstance(result.exception, DeltaflError)
        assert message in str(result.exception)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    result = cli("--model", VIT, "--data", TASK, "--out", out, "--tensorboard", ok=False)
    assert "tensorboard is not installed" in str(result.exception)
    assert not list(tmp_path.iterdir())
