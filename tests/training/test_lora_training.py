"""LoRA adapters trained, killed, loaded, evaluated, searched and trained on, from the outside."""

import json
import shutil
import signal
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from checkpoint_files import files_in, python, refusal, refused, succeed
from deltafl.checkpoints.layout import fingerprint, read_layout
from deltafl.merge.search_run import run_search
from deltafl.models import load_net
from deltafl.tasks import load_task
from deltafl.training import evaluate
from merge.test_search_run import language_recipe
from tiny_models import saved, tiny_llama, tiny_net, write_lines

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing`:FutureWarning"
)  # peft's

FILE, CONFIG = "adapter_model.safetensors", "adapter_config.json"
HOW = ("--steps", 9, "--lr", 1e-2, "--batch-size", 8, "--device", "cpu")

KILLED = """
import os, signal, sys
from deltafl.cli import main
from deltafl.training import finetune, loop

advance = loop.Run.advance

def stop(run):
    if run.step == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return advance(run)

loop.Run.advance = stop
main(sys.argv[1:])
"""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a base and lines."""
    saved(tiny_llama(tmp_path / "new"), tmp_path / "base")
    write_lines(tmp_path / "lines")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def tune(out: str, *arguments: object, model: str = "base") -> Path:
    how = ("--model", model, "--data", "lines:lines", "--out", out, *HOW)
    succeed("finetune", *how, *arguments)
    return Path(out)


def test_the_adapter_trains_and_is_written_alone_with_the_name_of_its_base(home: Path) -> None:
    before = files_in(home / "base")
    out = tune("out", "--lora-rank", 4)
    assert files_in(home / "base") == before
    written = {file.name for file in out.iterdir()}
    assert {FILE, CONFIG, "training.json", "tokenizer_config.json"} <= written
    assert not {"model.safetensors", "config.json"} & written
    config, training = (json.loads((out / n).read_text()) for n in (CONFIG, "training.json"))
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (4, 8, 0.0)
    assert config["base_model_name_or_path"] == training["base"]["id"] == str(home / "base")
    assert training["base"]["fingerprint"] == fingerprint(read_layout("base"))
    assert (training["num_steps"], training["lr"]) == (9, 0.01)
    assert training["num_examples"] == load_task("lines:lines", load_net("base").inputs).size(
        "train"
    )
    held = load_file(out / FILE)
    modules = {name.split(".")[-3] for name in held}
    assert modules == {f"{p}_proj" for p in ("q", "k", "v", "o", "gate", "up", "down")}
    assert all(tensor.dtype == torch.float32 and tensor.any() for tensor in held.values())


def test_targets_alpha_and_dropout_are_peft_s(home: Path) -> None:
    given = ("--lora-rank", 2, "--lora-alpha", 3, "--lora-targets", "q_proj", "up_proj")
    plain, dropped = tune("plain", *given), tune("dropped", *given, "--lora-dropout", 0.5)
    config = json.loads((dropped / CONFIG).read_text())
    assert (config["lora_alpha"], config["lora_dropout"]) == (3, 0.5)
    one, other = load_file(plain / FILE), load_file(dropped / FILE)
    assert {name.split(".")[-3] for name in one} == {"q_proj", "up_proj"}
    assert any(not torch.equal(one[name], other[name]) for name in one)


def test_it_is_trained_as_peft_s_own_model_is(home: Path) -> None:
    """Same initial A and B, same batches: a plain loop over PeftModel ends at the same adapter."""
    start = load_file(tune("start", "--lora-rank", 2, "--steps", 0) / FILE)
    assert not any(t.any() for name, t in start.items() if "lora_B" in name)
    net = load_net("start")
    task = load_task("lines:lines", net.inputs)
    base = AutoModelForCausalLM.from_pretrained("base")
    model = peft.PeftModel.from_pretrained(base, "start", is_trainable=True)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) == net.flat.numel()
    batch = task.batch("train", torch.arange(8))
    sums, weights = task.loss(net, batch)
    (sums.sum() / weights.sum()).backward()
    theirs, counts = task.loss(model, batch)
    (theirs.sum() / counts.sum()).backward()
    grads = torch.cat([p.grad.reshape(-1) for p in trained])
    assert torch.allclose(net.flat.grad, grads, rtol=1e-5, atol=1e-7)
    assert grads.any()


def test_peft_reads_what_we_write_and_we_read_what_peft_writes(home: Path) -> None:
    tune("out", "--lora-rank", 4)
    model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("base"), "out")
    ids = torch.arange(12).view(2, 6) + 5
    ours = load_net("out").module
    with torch.no_grad():
        assert torch.equal(ours(ids).logits, model(ids).logits)
    model.save_pretrained("theirs")
    with torch.no_grad():
        assert torch.equal(load_net("base+theirs").module(ids).logits, model(ids).logits)


def test_a_killed_run_resumes_to_the_same_bits(home: Path) -> None:
    given = ("--lora-rank", 3, "--lora-dropout", 0.1, "--eval-every", 1, "--save-every", 2, *HOW)
    how = ("finetune", "--model", "base", "--data", "lines:lines", *given, "--out")
    done = python(KILLED, *how, "out", cwd=home)
    assert done.returncode == -signal.SIGKILL, done.stderr
    state = Path("out.state")
    assert (
        state.stat().st_size < Path("base/model.safetensors").stat().st_size
    )  # the adapter's only
    succeed(*how, "out", "--resume")
    succeed(*how, "whole")
    one, whole = files_in(home / "out"), files_in(home / "whole")
    assert one == whole


def test_the_best_adapter_on_validation_is_kept(home: Path) -> None:
    tune("out", "--lora-rank", 3, "--eval-every", 1, "--lr", 3.0, "--lr-schedule", "constant")
    training, net = json.loads(Path("out/training.json").read_text()), load_net("out")
    task = load_task("lines:lines", net.inputs)
    assert evaluate(net, task, "val").score == pytest.approx(training["val_score"], abs=1e-6)


def test_an_adapter_is_trained_on_and_still_one_of_its_base(home: Path) -> None:
    tune("first", "--lora-rank", 2)
    tune("second", model="first")
    first, second = (load_file(Path(name) / FILE) for name in ("first", "second"))
    assert first.keys() == second.keys()
    assert any(not torch.equal(first[name], second[name]) for name in first)
    training = json.loads(Path("second/training.json").read_text())
    assert training["base"] == json.loads(Path("first/training.json").read_text())["base"]
    succeed("merge", "--base", "base", "--models", "first", "second", "--out", "merged")


def test_a_base_in_bfloat16_stays_and_the_adapter_is_float32(home: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained("base").bfloat16()
    model.save_pretrained("half")
    for file in Path("base").glob("*tok*"):
        shutil.copy(file, "half")
    out = tune("out", "--lora-rank", 2, model="half")
    assert {t.dtype for t in load_file(out / FILE).values()} == {torch.float32}
    module = load_net(out).module
    dtypes = {p.dtype for n, p in module.named_parameters() if "lora" not in n}
    assert dtypes == {torch.bfloat16}
    succeed("evaluate", "--models", out, "--data", "lines:lines")
    succeed("merge", "--base", "half", "--models", out, "--out", "merged")
    assert {t.dtype for t in load_file("merged/model.safetensors").values()} == {torch.bfloat16}


def test_adapters_are_searched_and_merged_by_examples_like_their_models(home: Path) -> None:
    for source, text in (("sums", "{} and {} are more"), ("days", "the {}th of May {}")):
        for split in ("train", "test"):
            file = home / source / f"{split}.txt"
            file.parent.mkdir(exist_ok=True)
            file.write_text("\n".join(text.format(i % 7, i) for i in range(30)))
        given = ("--data", f"lines:{source}", "--lora-rank", 4, *HOW)
        succeed("finetune", "--model", "base", *given, "--out", f"on-{source}")
        for name in ("low", "whole"):
            (home / name).mkdir(exist_ok=True)
        shutil.copytree(f"on-{source}", f"low/on-{source}")
        succeed(
            "merge", "--base", "base", "--models", f"on-{source}", "--out", f"whole/on-{source}"
        )
        shutil.copytree(source, f"low/{source}")
        shutil.copytree(source, f"whole/{source}")
    found = {}
    for name in ("low", "whole"):
        shutil.copytree("base", f"{name}/base")
        recipe = language_recipe(Path(name), methods=["task_arithmetic", "knots"])
        result = run_search(recipe, home / name / "merged")
        found[name] = [row["value"] for row in result["candidates"]]
    assert found["low"] == pytest.approx(found["whole"], abs=1e-4)
    assert len(set(found["low"])) > 4
    for name in ("low", "whole"):
        models = [home / name / f"on-{source}" for source in ("sums", "days")]
        tasks = ("--tasks", "lines:sums", "lines:days", "--examples", 8)
        how = ("--models", *models, *tasks, "--method", "regmean", "--out", f"regmean-{name}")
        succeed("merge", "--base", "base", *how)
    low, whole = (load_file(f"regmean-{n}/model.safetensors") for n in ("low", "whole"))
    for tensor in low:
        assert torch.allclose(low[tensor], whole[tensor], atol=1e-3), tensor
    succeed(
        "statistics",
        "--model",
        "on-sums",
        "--task",
        "lines:sums",
        "--kind",
        "gram",
        "--examples",
        8,
    )
    succeed(
        "statistics",
        "--model",
        "on-days",
        "--task",
        "lines:days",
        "--kind",
        "gram",
        "--examples",
        8,
    )
    succeed(
        "merge",
        "--base",
        "base",
        "--models",
        "on-sums",
        "on-days",
        "--method",
        "regmean",
        "--out",
        "told",
    )
    told, asked = (load_file(f"{n}/model.safetensors") for n in ("told", "regmean-low"))
    assert all(torch.equal(told[name], asked[name]) for name in told)


# What is refused


def test_what_cannot_have_a_lora_is_one_line(home: Path) -> None:
    tune("out", "--lora-rank", 2)
    how = ("--data", "lines:lines", *HOW, "--out", "x")
    lora = ("--lora-rank", 2)
    asked = ("finetune", *how, "--model")
    assert "lora_targets and lora_dropout need a lora_rank" in refusal(
        home, *asked, "base", "--lora-alpha", 2
    )
    assert 'model "out" has a LoRA, which trains; leave out --lora-rank' in refusal(
        home, *asked, "out", *lora
    )
    saved(tiny_net(), home / "vit")
    images = ("--data", "tiny_models:tiny_task_factory", *HOW, "--out", "x")
    assert 'model "vit" is no language model with weights' in refusal(
        home, "finetune", *images, "--model", "vit", *lora
    )
    assert "is no language model with weights" in refusal(home, *asked, "new/config.json", *lora)
    assert 'model "base" cannot be loaded: Target modules' in refusal(
        home, *asked, "base", *lora, "--lora-targets", "qq_proj"
    )


def test_an_adapter_without_its_base_is_one_line(home: Path) -> None:
    out = tune("out", "--lora-rank", 2)
    saved(tiny_llama(home / "new", 1), home / "other")
    asked = ("evaluate", "--data", "lines:lines", "--models")
    wrong = refusal(home, *asked, "other+out")
    assert wrong.startswith(
        'adapter "other+out": "other" is not the language model that it was made for'
    )
    shutil.move("base", "moved")
    (gone,) = refused(home, *asked, "out")
    assert str(home / "base") in gone
    succeed(*asked, "moved+out")
    config = json.loads((out / CONFIG).read_text())
    (out / CONFIG).write_text(json.dumps(config | {"use_dora": True}))
    assert "is more than plain LoRA" in refusal(home, *asked, "moved+out")
