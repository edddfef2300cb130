"""Fine-tuning and its centralised preset: against plain loops, what they leave, kills and resumes, two processes."""

import json
import math
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import nn

from checkpoint_files import fails, files_in, python, succeed
from deltafl.checkpoints.layout import fingerprint, read_layout
from deltafl.errors import DeltaflError
from deltafl.models import HeadRecipe, Net, load_net
from deltafl.models.fit import random_head
from deltafl.models.head import load_head, save_head
from deltafl.progress import OnProgress, Progress
from deltafl.seeding import keyed_generator
from deltafl.tasks import ImageTask, Task, load_task
from deltafl.tasks.images import Images
from deltafl.tasks.task import Split
from deltafl.training import CentralizedRecipe, TrainingRecipe, centralize, evaluate, finetune, loop
from deltafl.training.record import read_rows
from deltafl.training.step import batches, scores
from tiny_models import (
    NAMES,
    saved,
    tiny_images,
    tiny_llama,
    tiny_net,
    vit_file,
    without_timings,
    write_lines,
)

FINE = TrainingRecipe.of(
    model="tiny", data="halves", steps=12, lr=1e-2, batch_size=16, head="linear", seed=7, device="cpu",
)  # fmt: skip
CENTRAL = CentralizedRecipe.of(
    model="tiny", data="halves", epochs=3.0, lr=0.02, batch_size=16, head="linear", train_head=True, seed=7,
    device="cpu",
)  # fmt: skip
PER_EPOCH = 4  # 50 examples in batches of 16
TASK = "tiny_models:tiny_task_factory"

SCRIPT = """
import os, signal, sys
from accelerate import PartialState
from deltafl.models import load_net
from deltafl.tasks import load_task
from deltafl.training import CentralizedRecipe, TrainingRecipe, centralize, finetune
from tiny_models import tiny_images, tiny_net

def kill(progress):
    if progress.name == "steps" and progress.done == int(os.environ.get("KILL_AT", 0)):
        os.kill(os.getpid(), signal.SIGKILL)

kind, text = sys.argv[1:]
recipe = (CentralizedRecipe if kind == "centralize" else TrainingRecipe).model_validate_json(text)
net = tiny_net() if recipe.model == "tiny" else load_net(recipe.model)
task = tiny_images() if recipe.data.data == "halves" else load_task(recipe.data, net.inputs, 7)
globals()[kind](net, task, recipe, resume=True, on_progress=kill)
print(f"<{PartialState().num_processes}>")
"""


class StoppedError(Exception):
    pass


def stop_at(name: str, done: int) -> OnProgress:
    def stop(progress: Progress) -> None:
        if (progress.name, progress.done) == (name, done):
            raise StoppedError

    return stop


def run(
    recipe: TrainingRecipe, out: Path, net: Net | None = None, task: Task | None = None, **how: Any
):
    """Fine-tuning, or the centralised baseline for a recipe of that."""
    data = recipe.data
    own = replace(tiny_images(), augment=data.augment, label_smoothing=data.label_smoothing)
    train = centralize if isinstance(recipe, CentralizedRecipe) else finetune
    return train(net or tiny_net(), task or own, recipe.replace(out=str(out)), **how)


def stopped(recipe: TrainingRecipe, out: Path, name: str, done: int, **how: Any) -> None:
    with pytest.raises(StoppedError):
        run(recipe, out, on_progress=stop_at(name, done), **how)


def script(recipe: TrainingRecipe, **environment: str) -> Any:
    kind = "centralize" if isinstance(recipe, CentralizedRecipe) else "finetune"
    return python(SCRIPT, kind, recipe.model_dump_json(), env=environment)


def weights(out: Path) -> dict[str, torch.Tensor]:
    folder = out / "model" if (out / "model").is_dir() else out
    return {n: t for file in folder.glob("*.safetensors") for n, t in load_file(file).items()}


def assert_same(a: Path, b: Path) -> None:
    ours, theirs = weights(a), weights(b)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert sorted(f.name for f in a.rglob("*")) == sorted(f.name for f in b.rglob("*"))
    if (a / "record.jsonl").is_file():
        rows, others = (without_timings(read_rows(out / "record.jsonl")) for out in (a, b))
        assert rows == others
        results = [json.loads((out / "result.json").read_text()) for out in (a, b)]
        assert without_timings(results[:1]) == without_timings(results[1:])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of CENTRAL that nothing stopped."""
    out = tmp_path_factory.mktemp("whole") / "run"
    run(CENTRAL, out)
    return out


@pytest.mark.parametrize("nesterov", [False, True])
def test_a_run_is_a_plain_loop(nesterov: bool, tmp_path: Path):
    """The reference shares the network, the order of examples and the head's start, and no code of training."""
    recipe = CENTRAL.replace(
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
    rows = list(batches(torch.arange(50), 16, 7, 12))
    for epoch in range(4):
        encoder.eval()
        with torch.no_grad():
            right = logits(data["val"]).argmax(1) == data["val"].labels
            accuracies.append(right.double().mean().item())
        held.append({n: p.detach().clone() for n, p in encoder.named_parameters()})
        encoder.train()
        total = 0.0
        for step in range(PER_EPOCH * epoch, min(12, PER_EPOCH * (epoch + 1))):
            batch = data["train"].at(rows[step])
            loss = nn.functional.cross_entropy(logits(batch), batch.labels, label_smoothing=0.1)
            optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 0.5)
            falling = 0.01 * (1 + math.cos(math.pi * (step - 2) / 10))
            rate = optimiser.param_groups[0]["lr"] = 0.01 * (step + 1) if step < 2 else falling
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


def test_what_fine_tuning_leaves(tmp_path: Path):
    from transformers import AutoModel

    base = saved(tiny_net(), tmp_path / "base")
    (base / "preprocessor_config.json").write_text('{"image_mean": [0.4], "image_std": [0.3]}')
    net, task = load_net(base), tiny_images()
    before = {n: p.detach().clone() for n, p in net.module.named_parameters()}
    done = run(FINE.replace(epochs=4.0, steps=None), tmp_path / "out", net)
    assert all(torch.equal(p, before[n]) for n, p in net.module.named_parameters())
    assert sorted(f.name for f in done.out.iterdir()) == [
        "config.json", "head.safetensors", "model.safetensors", "preprocessor_config.json", "training.json",
    ]  # fmt: skip
    assert sorted(f.name for f in tmp_path.iterdir()) == ["base", "out"]
    wanted = {
        "base": {"id": str(base), "fingerprint": fingerprint(read_layout(base))},
        "task": "halves", "seed": 7, "num_steps": 16, "num_examples": 50, "lr": 1e-2, "momentum": None,
        "optimizer": "adamw", "weight_decay": 0.1, "batch_size": 16, "epochs": 4, "lr_schedule": "cosine",
        "warmup_steps": 1, "grad_clip": 1.0, "metric": "accuracy", "val_examples": 20,
    }  # fmt: skip
    recorded = json.loads((done.out / "training.json").read_text())
    assert {key: recorded[key] for key in wanted} == wanted
    tuned = load_net(done.out)
    assert recorded["val_score"] == evaluate(tuned, task, "val").score
    net.prepare(task, HeadRecipe(head=str(done.out / "head.safetensors")))
    found = evaluate(tuned, task)
    assert found.score > evaluate(net, task).score

    plain = AutoModel.from_pretrained(done.out, add_pooling_layer=False).eval()
    head, split = load_head(done.out / "head.safetensors"), task.splits["test"]
    with torch.no_grad():
        features = plain((split.images / 255 - 0.4) / 0.3).last_hidden_state[:, 0]
        expected = head(features).argmax(1) == split.labels
    assert torch.equal(found.scores, expected.float())


def test_what_the_baseline_leaves(whole: Path):
    left = {p.name for p in whole.iterdir()}
    assert left == {"config.yaml", "record.jsonl", "result.json", "model"}
    result, rows = (
        json.loads((whole / "result.json").read_text()),
        read_rows(whole / "record.jsonl"),
    )
    assert [row["epoch"] for row in rows] == [0, 1, 2, 3]
    accuracies = [row["val_score"] for row in rows]
    assert result["best_epoch"] == accuracies.index(max(accuracies))
    assert (result["metric"], result["ratio_scaled"], result["steps"]) == ("accuracy", True, 12)
    net = load_net(whole / "model")
    for split, key in (("test", "test_score"), ("val", "val_score")):
        assert evaluate(net, tiny_images(), split, device="cpu").score == result[key]
    facts = json.loads((whole / "model" / "training.json").read_text())
    expected = {"num_steps": PER_EPOCH * result["best_epoch"], "num_examples": 50, "lr": 0.02}
    expected |= {"momentum": 0.9, "epochs": result["best_epoch"], "val_score": max(accuracies)}
    assert {key: facts[key] for key in expected} == expected
    assert yaml.safe_load((whole / "config.yaml").read_text())["epochs"] == 3


def test_a_language_model_is_trained_by_the_same_loop(tmp_path: Path):
    net, lines = tiny_llama(tmp_path / "llama"), write_lines(tmp_path / "lines")
    task = load_task(str(lines), net.inputs)
    recipe = CENTRAL.replace(epochs=4.0, lr=0.5, patience=3, head="ridge", train_head=False)
    done = run(recipe, tmp_path / "whole", net, task)
    values = [row["val_score"] for row in done.rows]
    assert all(value < 0 for value in values)
    assert done.result["val_score"] == max(values) > values[0]
    assert (done.result["metric"], done.result["ratio_scaled"]) == ("log-likelihood", False)
    saved = evaluate(load_net(done.out / "model"), task, device="cpu").score
    assert done.result["test_score"] == pytest.approx(saved, abs=1e-6)


@pytest.mark.parametrize("kind", ["finetune a language model", "centralize"])
def test_a_killed_run_resumes_to_the_same_bits(kind: str, tmp_path: Path):
    cut, recipe, model, task = tmp_path / "cut", CENTRAL, tiny_net(), tiny_images()
    if kind != "centralize":
        model = tiny_llama(tmp_path / "llama")
        lines = str(write_lines(tmp_path / "lines"))
        task = load_task(lines, model.inputs, 7)
        recipe = FINE.replace(
            model=str(tmp_path / "llama" / "config.json"), data=lines, head="ridge"
        )
    recipe = recipe.replace(save_every=3, out=str(cut))
    killed = script(recipe, KILL_AT="7")
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    state = cut / "state" / "state.pt" if kind == "centralize" else tmp_path / "cut.state"
    assert state.is_file()
    assert not (cut / "result.json").exists()
    assert kind == "centralize" or not cut.exists()
    net = load_net(recipe.model) if kind != "centralize" else model
    steps: list[int] = []
    run(recipe, cut, net, task, resume=True,
        on_progress=lambda p: steps.append(p.done) if p.name == "steps" else None)  # fmt: skip
    assert steps == list(range(7, 13))
    assert not state.exists()
    done = run(recipe, tmp_path / "whole", net, task)
    assert_same(done.out, cut)
    if kind != "centralize":
        assert done.training["metric"] == "log-likelihood"
        assert done.training["val_score"] > evaluate(net, task, "val", device="cpu").score


@pytest.mark.parametrize("save_every", [0, 3])
def test_stopped_anywhere_and_again_it_resumes_to_the_same_bits(whole: Path, save_every, tmp_path):
    """After each step in turn, and between a row and its state; the last state is then up to four steps old."""
    out, recipe = tmp_path / "run", CENTRAL.replace(save_every=save_every)
    steps = [("steps", n) for n in range(1, 13)]
    epochs = [[("epochs", n)] for n in (0, 1, 3)]
    for at in (*epochs[0], *steps[:3], *epochs[1], *steps[3:11], *epochs[2], steps[11]):
        stopped(recipe, out, *at, resume=True)
    run(recipe, out, resume=True)
    assert_same(out, whole)


def test_the_test_examples_are_used_once_also_if_it_is_killed_before_the_result(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def killed(*arguments: object) -> None:
        raise StoppedError

    seen: list[str] = []
    module = sys.modules["deltafl.training.finetune"]
    for judging in (loop, module):
        monkeypatch.setattr(judging, "scores", lambda *a, **k: seen.append(a[2]) or scores(*a, **k))
    with monkeypatch.context() as patch:
        patch.setattr(module, "read_rows", killed)
        with pytest.raises(StoppedError):
            run(CENTRAL, tmp_path / "run")
    run(CENTRAL, tmp_path / "run", resume=True)
    assert seen == ["val"] * 4 + ["test"]
    assert_same(tmp_path / "run", whole)


@pytest.mark.parametrize("model", ["vit with dropout", "batch norm"])
def test_dropout_and_buffers_resume_to_the_same_bits(model: str, tmp_path: Path):
    def net() -> Net:
        if model == "batch norm":
            torch.manual_seed(0)
            return load_net("tiny_models:Convolution")
        made = tiny_net()
        made.module.encoder.embeddings.dropout.p = 0.3
        return made

    recipe = FINE.replace(optimizer="sgd", momentum=0.9, save_every=5)
    run(recipe, tmp_path / "whole", net())
    torch.rand(5)
    stopped(recipe, tmp_path / "cut", "steps", 8, net=net())
    state = torch.get_rng_state()
    run(recipe, tmp_path / "cut", net(), resume=True)
    if model != "batch norm":  # whose factory draws from the global generator
        assert torch.equal(torch.get_rng_state(), state)
    assert_same(tmp_path / "whole", tmp_path / "cut")


def test_a_finished_run_is_returned_and_another_refused(whole: Path):
    before = files_in(whole)
    again = run(CENTRAL, whole, resume=True)
    assert again.result == json.loads((whole / "result.json").read_text())
    for given, resume, words in (
        (CENTRAL.replace(lr=0.5, momentum=0.0), True, r"lr = 0.02, now it is 0.5(.|\n)*momentum"),
        (CENTRAL, False, "--overwrite"),
        (CENTRAL.replace(head="no/such/head", overwrite=True), False, "no/such/head"),
    ):
        fails(words, run, given, whole, resume=resume)
    assert files_in(whole) == before


def test_resuming_with_other_settings_names_them(tmp_path: Path):
    base = saved(tiny_net(), tmp_path / "base")
    out, recipe = tmp_path / "out", FINE.replace(save_every=5)
    stopped(recipe, out, "steps", 6, net=load_net(base))
    other = FINE.replace(lr=1e-3, few_shot=1, head="ridge")
    differences = r"head.few_shot = None, now it is 1(.|\n)*lr = 0.01, now it is 0.001"
    flipped = tiny_images()
    flipped.splits["train"].images[0] = 255 - flipped.splits["train"].images[0]
    for given, task, resume, words in (
        (other, None, True, differences),
        (recipe, flipped, True, "task_fingerprint"),
        (recipe, None, False, "--resume"),
    ):
        with pytest.raises(DeltaflError, match=words):
            run(given, out, load_net(base), task, resume=resume)
    done = run(other.replace(overwrite=True), out, load_net(base))
    for given, resume, words in ((FINE, True, r"head.few_shot"), (other, False, "exists")):
        with pytest.raises(DeltaflError, match=words):
            run(given, out, load_net(base), resume=resume)
    moved = load_net(base.rename(tmp_path / "moved"))
    again = run(other, out, moved, resume=True, on_progress=stop_at("steps", 1))
    assert again.training == done.training


def test_a_torn_state_is_refused(tmp_path: Path):
    stopped(CENTRAL, tmp_path / "run", "steps", PER_EPOCH)
    file = tmp_path / "run" / "state" / "state.pt"
    file.write_bytes(file.read_bytes()[:1000])
    (tmp_path / "out.state").write_bytes(b"torn")
    for recipe, out in ((CENTRAL, tmp_path / "run"), (FINE, tmp_path / "out")):
        fails("is not the state of a run; delete it to start", run, recipe, out, resume=True)


@pytest.mark.parametrize("recipe", [FINE, pytest.param(CENTRAL, marks=pytest.mark.slow)])
def test_two_processes_are_one_up_to_rounding(recipe: TrainingRecipe, tmp_path: Path):
    """50 examples in batches of 16 leave a last batch of 2: one example for each process."""
    file, recipe = tmp_path / "script.py", recipe.replace(train_head=True)
    file.write_text(SCRIPT)
    kind = "centralize" if isinstance(recipe, CentralizedRecipe) else "finetune"
    launch = ("--standalone", "--nproc_per_node", 2, file, kind)
    code = "from torch.distributed.run import main; main()"
    two = python(code, *launch, recipe.replace(out=str(tmp_path / "two")).model_dump_json())
    assert two.returncode == 0, two.stderr
    # on CPUs `accelerate launch` starts one process, however many are asked for
    assert two.stdout.count("<2>") == 2
    run(recipe, tmp_path / "one")
    theirs = weights(tmp_path / "two")
    for name, tensor in weights(tmp_path / "one").items():
        if not name.endswith("key.bias"):  # their gradient is rounding noise, which Adam scales up
            torch.testing.assert_close(theirs[name], tensor, rtol=1e-3, atol=1e-5)
    if isinstance(recipe, CentralizedRecipe):
        rows = [read_rows(tmp_path / n / "record.jsonl") for n in ("one", "two")]
        assert [r["val_score"] for r in rows[0]] == [r["val_score"] for r in rows[1]]


@pytest.mark.parametrize("augment", ["none", "crop_flip"])
def test_a_run_without_gain_stops_early_and_validation_is_not_augmented(augment: str, tmp_path):
    """At a rate of 1e-12 the model stays as it is, and so must its accuracy on the same images."""
    recipe = CENTRAL.replace(lr=1e-12, epochs=9.0, patience=2, augment=augment)
    done = run(recipe, tmp_path / "run")
    assert [row["epoch"] for row in done.rows] == [0, 1, 2]
    assert len({row["val_score"] for row in done.rows}) == 1
    found = (done.result["best_epoch"], done.result["epochs"], done.result["stopped_early"])
    assert found == (0, 2, True)


def test_augmentation_changes_training_images_by_seed_and_step(whole: Path, tmp_path: Path):
    losses = {"none": read_rows(whole / "record.jsonl")[1]["train_loss"]}
    for augment in ("flip", "crop_flip", "flip"):
        recipe = CENTRAL.replace(epochs=1.0, augment=augment)
        loss = run(recipe, tmp_path / f"{augment}{len(losses)}").rows[1]["train_loss"]
        assert losses.setdefault(augment, loss) == loss
    assert len(set(losses.values())) == 3


@pytest.mark.parametrize("kind", ["ridge", "probe", "file"])
def test_a_head_moves_only_if_it_trains_and_no_steps_write_the_base(kind: str, tmp_path: Path):
    given = random_head(16, NAMES, torch.Generator())
    file = tmp_path / "head.safetensors"
    save_head(given, file)
    recipe, heads = FINE.replace(head=str(file) if kind == "file" else kind), {}
    settings = {"start": {"steps": 0}, "frozen": {}, "trained": {"train_head": True}}
    for name, changes in settings.items():
        done = run(recipe.replace(**changes), tmp_path / name)
        heads[name] = load_head(done.out / "head.safetensors").weight
        assert done.training["num_steps"] == changes.get("steps", 12)
    assert torch.equal(heads["frozen"], heads["start"])
    assert not torch.equal(heads["trained"], heads["start"])
    assert torch.equal(heads["start"], given.weight) == (kind == "file")
    base, ours = tiny_net().trained, load_net(tmp_path / "start").module
    assert all(torch.equal(ours.get_parameter(n), t) for n, t in base.items())


def test_with_validations_the_best_model_is_kept(tmp_path: Path):
    """At a rate of 0.3 the model is soon worse than it was."""
    recipe = FINE.replace(
        optimizer="sgd", lr=0.3, lr_schedule="constant", warmup=0, epochs=4.0, steps=None, eval_every=2
    )  # fmt: skip
    seen: list[float] = []

    def see(progress: Progress) -> None:
        if progress.name == "epochs":
            seen.append(float(progress.numbers.get("val_score", -1.0)))

    done = run(recipe, tmp_path / "a", on_progress=see)
    assert [score >= 0 for score in seen] == [True, False, True, False, True]
    best = seen.index(max(seen))
    assert (done.training["epochs"], done.training["val_score"]) == (best, max(seen))
    assert done.training["num_steps"] == 4 * best
    assert evaluate(load_net(done.out), tiny_images(), "val").score == max(seen)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 0.0, "steps": None}, "epochs: must be greater than 0"),
        ({"steps": None}, "either steps or epochs"),
        ({"epochs": 1.0}, "either steps or epochs"),
        ({"lr": -1.0}, "lr: must be greater than 0"),
        ({"optimizer": "adam"}, 'did you mean "adamw"'),
        ({"lr_schedule": "cosin"}, 'lr_schedule: unknown "cosin"; did you mean "cosine"'),
        ({"mixed_precision": "fp16"}, 'unknown "fp16"'),
        ({"augment": "flop"}, 'data.augment: unknown "flop"'),
        ({"label_smoothing": 1.0}, "data.label_smoothing: must be less than 1"),
        ({"patience": 0}, "patience: must be greater than or equal to 1"),
        ({"few_shot": 3}, "head: few_shot is about the ridge head"),
        ({"nesterov": True}, "nesterov needs a momentum"),
        ({"lr": 0.0, "batch_size": 0, "momentum": 1.0}, "batch_size: must be greater than or equal to 1"),
    ],
    ids=str,
)  # fmt: skip
def test_mistakes_of_a_recipe_are_told_at_once_in_one_line_each(change: dict, message: str):
    settings = {"model": "m", "data": "d", "steps": 1, "head": "linear"} | change
    with pytest.raises(DeltaflError) as caught:
        TrainingRecipe.of(**settings)
    assert message in str(caught.value)
    assert len(caught.value.problems) == (3 if "batch_size" in change else 1)


class EmptyTask(ImageTask):
    def size(self, split: Split) -> int:
        return 0 if split == "val" else super().size(split)


def test_a_run_that_cannot_be_writes_nothing(tmp_path: Path):
    task, head = tiny_images(), tmp_path / "h.safetensors"
    save_head(random_head(5, NAMES, torch.Generator()), head)
    language = tiny_llama(tmp_path / "llama")
    lines = load_task(str(write_lines(tmp_path / "lines")), language.inputs)
    empty = EmptyTask(task.name, task.splits, task.class_names)
    diverging = FINE.replace(lr=1e38, optimizer="sgd", grad_clip=None)
    for recipe, data, message in (
        (diverging, task, "diverged"),
        (FINE, empty, "50 train and 0 val examples"),
        (FINE.replace(head="no/such/file"), task, "cannot be read"),
        (CENTRAL.replace(head=str(head)), task, "takes 5 features"),
        (FINE, lines, 'takes images; task "lines" has none'),
    ):
        fails(message, run, recipe, tmp_path / "out", task=data)
    fails("name a folder with --out", finetune, tiny_net(), task, FINE)
    fails("has no head", evaluate, tiny_net(), task)
    assert {f.name for f in tmp_path.iterdir()} == {"h.safetensors", "llama", "lines"}
    (tmp_path / "thesis.txt").write_text("mine")
    fails("exists", run, CENTRAL, tmp_path, resume=True)


def test_options_mean_what_the_library_means(tmp_path: Path):
    out, config = tmp_path / "out", tmp_path / "c.yaml"
    config.write_text(f"model: {vit_file()}\ndata: {TASK}\nepochs: 9\nlr: 5e-2\nseed: 7\n")
    given = ("--config", config, "--epochs", 2, "--batch-size", 16, "--head", "linear", "--train-head", "--out", out,
             "--lr-schedule", "linear", "--augment", "flip", "--patience", 4, "--device", "cpu")  # fmt: skip
    said = succeed("centralized", *given).out
    recipe = CENTRAL.replace(
        model=vit_file(), data=TASK, epochs=2.0, lr=5e-2, lr_schedule="linear", augment="flip", patience=4
    )  # fmt: skip
    direct = run(recipe, tmp_path / "direct")
    for row in direct.rows:
        assert f"epoch {row['epoch']}/2, " in said
        assert f"val_score {row['val_score']:.4g}" in said
    assert f"{direct.result['test_score']:.1%} of 31" in said
    assert (out / "figure.png").read_bytes().startswith(b"\x89PNG\r\n")
    page = (out / "report.html").read_text()
    assert page.count("<svg") == 2
    assert f"epoch {direct.result['best_epoch']})" in page
    assert succeed("centralized", *given, "--resume", "--quiet").out == ""
    for extra in [f for f in out.iterdir() if not (tmp_path / "direct" / f.name).exists()]:
        extra.unlink()
    assert_same(out, tmp_path / "direct")
