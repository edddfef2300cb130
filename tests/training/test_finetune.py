"""Fine-tuning of image classifiers and language models: what it leaves, killed and resumed, by one process or two."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from deltafl.checkpoints.layout import fingerprint, read_layout
from deltafl.errors import DeltaflError
from deltafl.models import HeadRecipe, Net, load_net
from deltafl.models.fit import random_head
from deltafl.models.head import load_head, save_head
from deltafl.progress import OnProgress, Progress
from deltafl.tasks import ImageTask, Task, load_task
from deltafl.tasks.task import Split
from deltafl.training import Finetuned, TrainingRecipe, evaluate, finetune
from deltafl.training.state import state_path
from tiny_models import NAMES, tiny_images, tiny_llama, tiny_net, write_lines

RECIPE = TrainingRecipe.of(
    model="tiny", data="halves", steps=12, lr=1e-2, batch_size=16, head="linear", seed=7
)

SCRIPT = """
import os, signal, sys
from deltafl.models import load_net
from deltafl.tasks import load_task
from deltafl.training import TrainingRecipe, finetune
from tiny_models import tiny_images

def kill(progress):
    if progress.name == "steps" and progress.done == int(os.environ.get("KILL_AT", 0)):
        os.kill(os.getpid(), signal.SIGKILL)

model, data, out = sys.argv[1:]
net = load_net(model)
task = tiny_images() if data == "halves" else load_task(data, net.inputs, 7)
head = {"head": "linear", "train_head": True} if data == "halves" else {}
recipe = TrainingRecipe.of(model=model, data=data, steps=12, lr=1e-2, batch_size=16, seed=7,
    save_every=4, device="cpu", out=out, **head)
finetune(net, task, recipe, resume=True, on_progress=kill)
"""


def run_script(
    *arguments: Path | str, launcher: tuple[str, ...] = (), **environment: str
) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *(launcher or ("-c", SCRIPT)), *map(str, arguments)],
        env=env | environment,
        capture_output=True,
        text=True,
    )


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {n: t for file in folder.glob("*.safetensors") for n, t in load_file(file).items()}


def assert_same_bits(a: Path, b: Path) -> None:
    ours, theirs = weights(a), weights(b)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def run(
    net: Net, out: Path, recipe: TrainingRecipe = RECIPE, *, task: Task | None = None, **how: Any
) -> Finetuned:
    return finetune(net, task or tiny_images(), recipe.replace(out=str(out)), **how)


def stop_at(step: int) -> OnProgress:
    def stop(progress: Progress) -> None:
        if progress.name == "steps" and progress.done == step:
            raise KeyboardInterrupt

    return stop


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    folder.mkdir()
    tiny_net().save(folder)
    (folder / "preprocessor_config.json").write_text('{"image_mean": [0.4], "image_std": [0.3]}')
    return folder


def test_what_a_run_leaves(base: Path, tmp_path: Path):
    from transformers import AutoModel

    net, task = load_net(base), tiny_images()
    before = {n: p.detach().clone() for n, p in net.module.named_parameters()}
    done = run(net, tmp_path / "out", RECIPE.replace(epochs=4.0), task=task)
    assert all(torch.equal(p, before[n]) for n, p in net.module.named_parameters())
    assert sorted(f.name for f in done.out.iterdir()) == [
        "config.json", "head.safetensors", "model.safetensors", "preprocessor_config.json", "training.json",
    ]  # fmt: skip
    assert sorted(f.name for f in tmp_path.iterdir()) == ["base", "out"]
    recorded = json.loads((done.out / "training.json").read_text())
    assert recorded == done.training
    wanted = {
        "base": {"id": str(base), "fingerprint": fingerprint(read_layout(base))},
        "task": "halves", "seed": 7, "num_steps": 16, "num_examples": 50, "lr": 1e-2, "momentum": None,
        "optimizer": "adamw", "weight_decay": 0.1, "batch_size": 16, "epochs": 4, "lr_schedule": "cosine",
        "warmup_steps": 1, "grad_clip": 1.0, "metric": "accuracy", "val_examples": 20,
    }  # fmt: skip
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


def test_same_seed_same_bits_other_seed_other_bits(base: Path, tmp_path: Path):
    head = tmp_path / "h.safetensors"
    save_head(random_head(16, NAMES, torch.Generator()), head)
    recipe = RECIPE.replace(head=str(head))
    for name, seed in (("a", 7), ("b", 7), ("c", 8)):
        run(load_net(base), tmp_path / name, recipe.replace(seed=seed))
    assert_same_bits(tmp_path / "a", tmp_path / "b")
    a, c = (weights(tmp_path / name)["layernorm.weight"] for name in "ac")
    assert not torch.equal(a, c)
    assert torch.equal(weights(tmp_path / "a")["weight"], load_head(head).weight)


@pytest.mark.parametrize("kind", ["images", "language"])
def test_a_killed_run_resumes_to_the_same_bits(kind: str, base: Path, tmp_path: Path):
    model, data = base, "halves"
    if kind == "language":
        tiny_llama(tmp_path / "llama")
        model, data = tmp_path / "llama" / "config.json", str(write_lines(tmp_path / "lines"))
    whole = run_script(model, data, tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    killed = run_script(model, data, tmp_path / "cut", KILL_AT="7")
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert state_path(tmp_path / "cut").is_file()
    assert not (tmp_path / "cut").exists()
    net = load_net(model)
    task = tiny_images() if kind == "images" else load_task(data, net.inputs, 7)
    steps: list[int] = []
    recipe = RECIPE.replace(
        model=str(model), data=data, train_head=True, device="cpu", out=str(tmp_path / "cut")
    )
    done = finetune(
        net,
        task,
        recipe,
        resume=True,
        on_progress=lambda p: steps.append(p.done) if p.name == "steps" else None,
    )
    assert steps == list(range(5, 13))
    assert_same_bits(tmp_path / "whole", done.out)
    assert not state_path(done.out).exists()
    if kind == "language":
        assert done.training["metric"] == "log-likelihood"
        assert done.training["val_score"] > evaluate(net, task, "val").score
        again = evaluate(load_net(done.out), task, "val")
        assert again.score == pytest.approx(done.training["val_score"], abs=1e-6)
        assert len(again.scores) == task.size("val")


@pytest.mark.parametrize("model", ["vit with dropout", "batch norm"])
def test_dropout_and_buffers_resume_to_the_same_bits(model: str, tmp_path: Path):
    def net() -> Net:
        if model == "batch norm":
            torch.manual_seed(0)
            return load_net("tiny_models:Convolution")
        made = tiny_net()
        made.module.encoder.embeddings.dropout.p = 0.3
        return made

    recipe = RECIPE.replace(optimizer="sgd", momentum=0.9, save_every=5)
    run(net(), tmp_path / "whole", recipe)
    torch.rand(5)
    with pytest.raises(KeyboardInterrupt):
        run(net(), tmp_path / "cut", recipe, on_progress=stop_at(8))
    state = torch.get_rng_state()
    run(net(), tmp_path / "cut", recipe, resume=True)
    if model != "batch norm":  # whose factory draws from the global generator
        assert torch.equal(torch.get_rng_state(), state)
    assert_same_bits(tmp_path / "whole", tmp_path / "cut")


def test_resuming_with_other_settings_names_them(base: Path, tmp_path: Path):
    out, recipe = tmp_path / "out", RECIPE.replace(save_every=5)
    with pytest.raises(KeyboardInterrupt):
        run(load_net(base), out, recipe, on_progress=stop_at(6))
    other = RECIPE.replace(lr=1e-3, few_shot=1, head="ridge")
    with pytest.raises(
        DeltaflError,
        match=r"head.few_shot = None, now it is 1(.|\n)*lr = 0.01, now it is 0.001",
    ):
        run(load_net(base), out, other, resume=True)
    flipped = tiny_images()
    flipped.splits["train"].images[0] = 255 - flipped.splits["train"].images[0]
    with pytest.raises(DeltaflError, match="task_fingerprint"):
        run(load_net(base), out, recipe, task=flipped, resume=True)
    with pytest.raises(DeltaflError, match="--resume"):
        run(load_net(base), out, recipe)
    run(load_net(base), out, other.replace(overwrite=True))
    with pytest.raises(DeltaflError, match=r"head.few_shot"):
        run(load_net(base), out, RECIPE, resume=True)
    with pytest.raises(DeltaflError, match="exists"):
        run(load_net(base), out, other)
    moved = base.rename(tmp_path / "moved")
    again = run(load_net(moved), out, other, resume=True, on_progress=stop_at(1))
    assert again.training == json.loads((out / "training.json").read_text())


def test_a_state_file_that_is_none(base: Path, tmp_path: Path):
    state_path(tmp_path / "out").write_bytes(b"torn")
    with pytest.raises(DeltaflError, match="is not the state of a run"):
        run(load_net(base), tmp_path / "out", resume=True)


def test_two_processes_are_one_up_to_rounding(base: Path, tmp_path: Path):
    """50 examples in batches of 16 leave a last batch of 2: one example for each process."""
    script = tmp_path / "script.py"
    script.write_text(
        SCRIPT
        + "\nfrom accelerate import PartialState\nprint(f'<{PartialState().num_processes}>')\n"
    )
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script))
    two = run_script(base, "halves", tmp_path / "two", launcher=launcher)
    assert two.returncode == 0, two.stderr
    # on CPUs `accelerate launch` starts one process, however many are asked for
    assert two.stdout.count("<2>") == 2
    run(load_net(base), tmp_path / "one", RECIPE.replace(train_head=True, device="cpu"))
    ours, theirs = weights(tmp_path / "one"), weights(tmp_path / "two")
    for name, tensor in ours.items():
        if not name.endswith("key.bias"):  # their gradient is rounding noise, which Adam scales up
            torch.testing.assert_close(theirs[name], tensor, rtol=1e-3, atol=1e-5)


def test_no_steps_write_the_base(base: Path, tmp_path: Path):
    done = run(load_net(base), tmp_path / "out", RECIPE.replace(steps=0))
    ours, theirs = load_file(base / "model.safetensors"), load_file(done.out / "model.safetensors")
    assert all(torch.equal(ours[n], theirs[n]) for n in ours)
    assert done.training["num_steps"] == 0


@pytest.mark.parametrize("kind", ["ridge", "probe", "file"])
def test_a_head_moves_only_if_it_trains(kind: str, tmp_path: Path):
    given = random_head(16, NAMES, torch.Generator())
    file = tmp_path / "head.safetensors"
    save_head(given, file)
    recipe = RECIPE.replace(head=str(file) if kind == "file" else kind)
    heads = {}
    for name, settings in (
        ("start", {"steps": 0}),
        ("frozen", {}),
        ("trained", {"train_head": True}),
    ):
        done = run(tiny_net(), tmp_path / name, recipe.replace(**settings))
        heads[name] = load_head(done.out / "head.safetensors").weight
    assert torch.equal(heads["frozen"], heads["start"])
    assert not torch.equal(heads["trained"], heads["start"])
    assert torch.equal(heads["start"], given.weight) == (kind == "file")


def test_with_validations_the_best_model_is_kept(tmp_path: Path):
    """At a rate of 0.3 the model is soon worse than it was."""
    recipe = RECIPE.replace(optimizer="sgd", lr=0.3, lr_schedule="constant", warmup=0, epochs=4.0)
    seen: list[float] = []

    def see(progress: Progress) -> None:
        if progress.name == "epochs":
            seen.append(float(progress.numbers.get("val_score", -1.0)))

    done = run(tiny_net(), tmp_path / "a", recipe.replace(eval_every=2), on_progress=see)
    assert [score >= 0 for score in seen] == [True, False, True, False, True]
    best = seen.index(max(seen))
    assert (done.training["epochs"], done.training["val_score"]) == (best, max(seen))
    assert done.training["num_steps"] == 4 * best
    assert evaluate(load_net(done.out), tiny_images(), "val").score == max(seen)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": None}, "either steps or epochs"),
        ({"steps": 1, "epochs": 1.0}, "either steps or epochs"),
        ({"lr": -1.0}, "lr: must be greater than 0"),
        ({"optimizer": "adam"}, 'did you mean "adamw"'),
        ({"lr_schedule": "triangle"}, 'lr_schedule: unknown "triangle"'),
        ({"mixed_precision": "fp16"}, 'unknown "fp16"'),
        ({"label_smoothing": 1.0}, "data.label_smoothing: must be less than 1"),
        ({"few_shot": 3}, "head: few_shot is about the ridge head"),
        ({"nesterov": True}, "nesterov needs a momentum"),
    ],
)
def test_a_bad_recipe_is_one_clear_line(change: dict[str, Any], message: str):
    settings = {"model": "m", "data": "d", "steps": 1, "head": "linear"} | change
    with pytest.raises(DeltaflError) as caught:
        TrainingRecipe.of(**settings)
    assert message in str(caught.value)


def test_all_mistakes_of_a_recipe_at_once():
    with pytest.raises(DeltaflError) as caught:
        TrainingRecipe.of(model="m", data="d", lr=0.0, batch_size=0, momentum=1.0)
    assert len(caught.value.problems) == 3


def test_a_run_that_cannot_be_writes_nothing(base: Path, tmp_path: Path):
    task, out = tiny_images(), tmp_path / "out"
    empty = EmptyTask(task.name, task.splits, task.class_names)
    head = tmp_path / "h.safetensors"
    save_head(random_head(5, NAMES, torch.Generator()), head)
    diverging = RECIPE.replace(lr=1e38, optimizer="sgd", grad_clip=None)
    for recipe, data, message in (
        (diverging, task, "diverged"),
        (RECIPE, empty, "50 train and 0 val examples"),
        (RECIPE.replace(head="no/such/file"), task, "cannot be read"),
        (RECIPE.replace(head=str(head)), task, "takes 5 features"),
    ):
        with pytest.raises(DeltaflError, match=message):
            run(load_net(base), out, recipe, task=data)
    with pytest.raises(DeltaflError, match="name a folder with --out"):
        finetune(load_net(base), task, RECIPE)
    with pytest.raises(DeltaflError, match="has no head"):
        evaluate(load_net(base), task)
    language = tiny_llama(tmp_path / "llama")
    with pytest.raises(DeltaflError, match='takes images; task "lines" has none'):
        run(
            load_net(base),
            out,
            task=load_task(str(write_lines(tmp_path / "lines")), language.inputs),
        )
    assert {f.name for f in tmp_path.iterdir()} == {"base", "h.safetensors", "llama", "lines"}


class EmptyTask(ImageTask):
    def size(self, split: Split) -> int:
        return 0 if split == "val" else super().size(split)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_on_a_gpu(precision: str, tmp_path: Path):
    recipe = RECIPE.replace(mixed_precision=precision, save_every=5)
    for device in ("cuda", "cpu"):
        run(tiny_net(), tmp_path / device, recipe.replace(device=device))
    ours, theirs = weights(tmp_path / "cuda"), weights(tmp_path / "cpu")
    tolerance = 1e-3 if precision == "no" else 5e-2
    for name, tensor in ours.items():
        if not name.endswith("key.bias"):
            torch.testing.assert_close(theirs[name], tensor, rtol=0.1, atol=tolerance)
    found = [
        evaluate(load_net(tmp_path / "cuda"), tiny_images(), device=d) for d in ("cuda", "cpu")
    ]
    assert found[0].score == pytest.approx(found[1].score, abs=0.1)
