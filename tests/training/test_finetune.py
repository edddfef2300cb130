import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from deltafl.checkpoints.layout import fingerprint, read_layout
from deltafl.errors import DeltaflError
from deltafl.models import LoadedEncoder, load_encoder, save_encoder
from deltafl.models.flat import FlatModel
from deltafl.models.heads import load_head, save_head
from deltafl.tasks.arrays import Split
from deltafl.training import FinetuneRecipe, evaluate, finetune, make_head, state_path
from tiny_models import NAMES, tiny_head, tiny_task, tiny_vit

RECIPE = FinetuneRecipe(steps=12, lr=1e-2, batch_size=16, head="linear", seed=7)

SCRIPT = """
import os, signal, sys
from tiny_models import tiny_task
from deltafl.training import FinetuneRecipe, finetune
from deltafl.models import load_encoder

def on_progress(done, total, loss):
    if done == int(os.environ.get("KILL_AT", 0)):
        os.kill(os.getpid(), signal.SIGKILL)

recipe = FinetuneRecipe(steps=12, lr=1e-2, batch_size=16, head="linear", seed=7, train_head=True)
finetune(load_encoder(sys.argv[1]), tiny_task(), recipe, sys.argv[2], save_every=4, resume=True, device="cpu",
         on_progress=on_progress)
"""


def run_script(
    *arguments: str, launcher: tuple[str, ...] = (), **environment: str
) -> subprocess.CompletedProcess[str]:
    env = (
        os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"} | environment
    )
    return subprocess.run(
        [sys.executable, *(launcher or ("-c", SCRIPT)), *arguments],
        env=env,
        capture_output=True,
        text=True,
    )


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors") | load_file(folder / "head.safetensors")


def assert_same_bits(a: Path, b: Path) -> None:
    ours, theirs = weights(a), weights(b)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    folder.mkdir()
    save_encoder(tiny_vit(), folder)
    (folder / "preprocessor_config.json").write_text('{"image_mean": [0.4], "image_std": [0.3]}')
    return folder


def test_what_a_run_leaves(base: Path, tmp_path: Path):
    from transformers import AutoModel

    encoder, task = load_encoder(base), tiny_task()
    before = {n: p.detach().clone() for n, p in encoder.module.named_parameters()}
    done = finetune(encoder, task, replace(RECIPE, steps=None, epochs=4), tmp_path / "out")
    assert all(torch.equal(p, before[n]) for n, p in encoder.module.named_parameters())
    assert sorted(f.name for f in done.out.iterdir()) == [
        "config.json", "head.safetensors", "model.safetensors", "preprocessor_config.json", "training.json",
    ]  # fmt: skip
    assert sorted(f.name for f in tmp_path.iterdir()) == ["base", "out"]
    recorded = json.loads((done.out / "training.json").read_text())
    assert recorded == done.training
    wanted = {
        "base": {"id": str(base), "fingerprint": fingerprint(read_layout(base))},
        "task": "halves", "seed": 7, "num_steps": 16, "num_examples": 50, "num_classes": 3, "lr": 1e-2,
        "momentum": None, "optimizer": "adamw", "weight_decay": 0.1, "batch_size": 16, "epochs": 4,
        "schedule": "cosine", "warmup_steps": 1, "grad_clip": 1.0, "label_smoothing": 0.0, "val_examples": 20,
    }  # fmt: skip
    assert {key: recorded[key] for key in wanted} == wanted
    assert recorded["val_score"] == evaluate(done.out, task, "val").accuracy
    assert (
        evaluate(done.out, task).accuracy
        > evaluate(base, task, head=done.out / "head.safetensors").accuracy
    )

    plain = AutoModel.from_pretrained(done.out, add_pooling_layer=False).eval()
    head, split = load_head(done.out / "head.safetensors"), task.test
    with torch.no_grad():
        features = plain((split.images / 255 - 0.4) / 0.3).last_hidden_state[:, 0]
    expected = (features @ head.weight.T + head.bias).argmax(1) == split.labels
    assert torch.equal(evaluate(done.out, task).correct, expected.to(torch.uint8))


def test_same_seed_same_bits_other_seed_other_bits(base: Path, tmp_path: Path):
    head = tiny_head()
    for name, recipe in (("a", RECIPE), ("b", RECIPE), ("c", replace(RECIPE, seed=8))):
        finetune(load_encoder(base), tiny_task(), recipe, tmp_path / name, head=head)
    assert_same_bits(tmp_path / "a", tmp_path / "b")
    assert not torch.equal(
        weights(tmp_path / "a")["layernorm.weight"], weights(tmp_path / "c")["layernorm.weight"]
    )
    assert torch.equal(weights(tmp_path / "a")["weight"], head.weight)


def test_a_killed_run_resumes_to_the_same_bits(base: Path, tmp_path: Path):
    whole = run_script(str(base), str(tmp_path / "whole"))
    assert whole.returncode == 0, whole.stderr
    killed = run_script(str(base), str(tmp_path / "cut"), KILL_AT="7")
    assert killed.returncode == -signal.SIGKILL
    assert state_path(tmp_path / "cut").is_file()
    assert not (tmp_path / "cut").exists()
    steps: list[int] = []
    recipe = replace(RECIPE, train_head=True)
    torch_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        done = finetune(
            load_encoder(base), tiny_task(), recipe, tmp_path / "cut", resume=True, device="cpu",
            on_progress=lambda done, total, loss: steps.append(done),
        )  # fmt: skip
    finally:
        torch.set_num_threads(torch_threads)
    assert steps == list(range(5, 13))
    assert_same_bits(tmp_path / "whole", done.out)
    assert not state_path(done.out).exists()


def stop_at(step: int):
    def on_progress(done: int, total: int, loss: torch.Tensor) -> None:
        if done == step:
            raise KeyboardInterrupt

    return on_progress


@pytest.mark.parametrize("model", ["vit with dropout", "batch norm"])
def test_dropout_and_buffers_resume_to_the_same_bits(model: str, tmp_path: Path):
    def encoder() -> LoadedEncoder:
        if model == "batch norm":
            torch.manual_seed(0)
            return load_encoder("tiny_models:Convolution")
        made = tiny_vit()
        made.module.embeddings.dropout.p = 0.3
        return made

    recipe = replace(RECIPE, optimizer="sgd", momentum=0.9)
    finetune(encoder(), tiny_task(), recipe, tmp_path / "whole")
    torch.rand(5)
    with pytest.raises(KeyboardInterrupt):
        finetune(
            encoder(), tiny_task(), recipe, tmp_path / "cut", save_every=5, on_progress=stop_at(8)
        )
    state = torch.get_rng_state()
    finetune(encoder(), tiny_task(), recipe, tmp_path / "cut", resume=True)
    if model != "batch norm":  # whose factory draws from the global generator
        assert torch.equal(torch.get_rng_state(), state)
    assert_same_bits(tmp_path / "whole", tmp_path / "cut")


def test_resuming_with_other_settings_names_them(base: Path, tmp_path: Path):
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        finetune(load_encoder(base), tiny_task(), RECIPE, out, save_every=5, on_progress=stop_at(6))
    other = replace(RECIPE, lr=1e-3, batch_size=8)
    with pytest.raises(
        DeltaflError, match=r"batch_size = 16, now it is 8(.|\n)*lr = 0.01, now it is 0.001"
    ):
        finetune(load_encoder(base), tiny_task(), other, out, resume=True)
    flipped = tiny_task()
    flipped.train.images[0] = 255 - flipped.train.images[0]
    with pytest.raises(DeltaflError, match="task_fingerprint"):
        finetune(load_encoder(base), flipped, RECIPE, out, resume=True)
    with pytest.raises(DeltaflError, match="--resume"):
        finetune(load_encoder(base), tiny_task(), RECIPE, out)
    finetune(load_encoder(base), tiny_task(), other, out, overwrite=True)
    with pytest.raises(DeltaflError, match="batch_size"):
        finetune(load_encoder(base), tiny_task(), RECIPE, out, resume=True)
    with pytest.raises(DeltaflError, match="exists"):
        finetune(load_encoder(base), tiny_task(), other, out)
    again = finetune(
        load_encoder(base), tiny_task(), other, out, resume=True, on_progress=stop_at(1)
    )
    assert again.training == json.loads((out / "training.json").read_text())


def test_a_state_file_that_is_none(base: Path, tmp_path: Path):
    state_path(tmp_path / "out").write_bytes(b"torn")
    with pytest.raises(DeltaflError, match="is not the state of a run"):
        finetune(load_encoder(base), tiny_task(), RECIPE, tmp_path / "out", resume=True)


def test_two_processes_are_one_up_to_rounding(base: Path, tmp_path: Path):
    """50 examples in batches of 16 leave a last batch of 2: one example for each process."""
    script = tmp_path / "script.py"
    script.write_text(
        SCRIPT
        + "\nfrom accelerate import PartialState\nprint(f'<{PartialState().num_processes}>')\n"
    )
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script))
    two = run_script(str(base), str(tmp_path / "two"), launcher=launcher)
    assert two.returncode == 0, two.stderr
    assert (
        two.stdout.count("<2>") == 2
    )  # on CPUs `accelerate launch` starts one process, however many are asked for
    finetune(
        load_encoder(base),
        tiny_task(),
        replace(RECIPE, train_head=True),
        tmp_path / "one",
        device="cpu",
    )
    ours, theirs = weights(tmp_path / "one"), weights(tmp_path / "two")
    for name, tensor in ours.items():
        if not name.endswith("key.bias"):  # their gradient is rounding noise, which Adam scales up
            torch.testing.assert_close(theirs[name], tensor, rtol=1e-3, atol=1e-5)


def test_no_steps_write_the_base(base: Path, tmp_path: Path):
    done = finetune(load_encoder(base), tiny_task(), replace(RECIPE, steps=0), tmp_path / "out")
    ours, theirs = load_file(base / "model.safetensors"), load_file(done.out / "model.safetensors")
    assert all(torch.equal(ours[n], theirs[n]) for n in ours)
    assert done.training["num_steps"] == 0


@pytest.mark.parametrize("head", ["ridge", "few", "linear", "file"])
def test_heads(head: str, tmp_path: Path):
    model, task = FlatModel(tiny_vit()), tiny_task(train=300, val=90)
    save_head(tiny_head(), tmp_path / "h.safetensors")
    recipe = {
        "ridge": FinetuneRecipe(steps=0),
        "few": FinetuneRecipe(steps=0, few_shot=1),
        "linear": FinetuneRecipe(steps=0, head="linear"),
        "file": FinetuneRecipe(steps=0, head=str(tmp_path / "h.safetensors")),
    }[head]
    made = make_head(model, task, recipe)
    assert made.class_names == NAMES
    assert made.feature_dim == 16
    assert not made.parameters()
    again = make_head(model, task, recipe)
    assert torch.equal(made.weight, again.weight)
    if head == "few":
        full = make_head(model, task, replace(recipe, few_shot=None))
        assert not torch.equal(made.weight, full.weight)
    if head == "file":
        assert torch.equal(made.weight, tiny_head().weight)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": None}, "either steps or epochs"),
        ({"epochs": 1.0}, "either steps or epochs"),
        ({"lr": -1.0}, "lr must be positive"),
        ({"optimizer": "adam"}, 'did you mean "adamw"'),
        ({"schedule": "triangle"}, "unknown schedule"),
        ({"mixed_precision": "fp16"}, 'unknown mixed_precision "fp16"'),
        ({"label_smoothing": 1.0}, "label_smoothing"),
        ({"few_shot": 3}, "ridge"),
        ({"head": "no/such/file"}, "cannot be read"),
    ],
)
def test_a_bad_recipe_is_one_clear_line(change, message: str, tmp_path: Path):
    with pytest.raises(DeltaflError, match=message):
        finetune(tiny_vit(), tiny_task(), replace(RECIPE, **change), tmp_path / "out")
    assert not any(tmp_path.iterdir())


def test_all_mistakes_of_a_recipe_at_once():
    assert len(FinetuneRecipe(lr=0, batch_size=0, momentum=1).problems()) == 4


def test_a_diverged_run_writes_nothing(tmp_path: Path):
    recipe = replace(RECIPE, lr=1e38, optimizer="sgd", grad_clip=None)
    with pytest.raises(DeltaflError, match="diverged"):
        finetune(tiny_vit(), tiny_task(), recipe, tmp_path / "out")
    assert not any(tmp_path.iterdir())


def test_empty_splits_and_missing_heads(base: Path, tmp_path: Path):
    task = tiny_task()
    empty = Split(task.val.images[:0], task.val.labels[:0])
    with pytest.raises(DeltaflError, match="50 training and 0 validation"):
        finetune(tiny_vit(), replace(task, val=empty), RECIPE, tmp_path / "out")
    with pytest.raises(DeltaflError, match="has no head"):
        evaluate(base, task)
    with pytest.raises(DeltaflError, match="unknown split"):
        evaluate(base, task, "train")
    with pytest.raises(DeltaflError, match="takes 5 features"):
        evaluate(base, task, head=tiny_head(5))
    with pytest.raises(DeltaflError, match="takes 5 features"):
        finetune(tiny_vit(), task, RECIPE, tmp_path / "out", head=tiny_head(5))


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_on_a_gpu(precision: str, tmp_path: Path):
    recipe = replace(RECIPE, mixed_precision=precision)
    finetune(tiny_vit(), tiny_task(), recipe, tmp_path / "gpu", device="cuda", save_every=5)
    finetune(tiny_vit(), tiny_task(), recipe, tmp_path / "cpu", device="cpu")
    ours, theirs = weights(tmp_path / "gpu"), weights(tmp_path / "cpu")
    tolerance = 1e-3 if precision == "no" else 5e-2
    for name, tensor in ours.items():
        if not name.endswith("key.bias"):
            torch.testing.assert_close(theirs[name], tensor, rtol=0.1, atol=tolerance)
    assert evaluate(tmp_path / "gpu", tiny_task(), device="cuda").accuracy == pytest.approx(
        evaluate(tmp_path / "gpu", tiny_task(), device="cpu").accuracy, abs=0.1
    )
