"""Statistics beside models: a merge by them is the merge by the examples that they were made of."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoint_files import files_in, load, refusal, refused, succeed
from deltafl.merge import examples
from deltafl.merge.examples import write_statistics
from deltafl.merge.recipe import StatisticsRecipe
from tiny_models import tiny_llama, tiny_net, write_lines

TASKS = ("digits", "digits:thick")
KINDS = {"gram": "regmean", "fisher": "fisher"}
FEW = ("--examples", 20, "--seed", 3)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny ViT, two fine-tunes of it with heads, and the statistics of both, of both kinds."""
    root, net = tmp_path_factory.mktemp("models"), tiny_net()
    (root / "base").mkdir()
    net.save(root / "base")
    tuned = ("--model", root / "base", "--steps", 3, "--lr", 0.01, "--limit", 90)
    for i, task in enumerate(TASKS):
        succeed("finetune", *tuned, "--data", task, "--out", root / f"m{i}", "--quiet")
        for kind in KINDS:
            given = ("--model", root / f"m{i}", "--task", task, "--kind", kind)
            said = succeed("statistics", *given, *FEW).out
            assert said == f"statistics: {root / f'm{i}' / 'statistics' / kind}\n"
    return root


@pytest.fixture
def world(models: Path, tmp_path: Path) -> Path:
    """A copy, to change."""
    return shutil.copytree(models, tmp_path / "world")


def merge(root: Path, *more: object) -> tuple[object, ...]:
    named = ("--base", root / "base", "--models", root / "m0", root / "m1")
    return ("merge", *named, "--out", root / "out", "--overwrite", *more)


@pytest.mark.parametrize("weights", [(), ("--weights", 3, 1), ("--exclude", "*.bias")])
@pytest.mark.parametrize("kind", KINDS)
def test_statistics_give_the_merge_by_tasks(models: Path, kind: str, weights: tuple) -> None:
    called = merge(models, "--method", KINDS[kind], *weights)
    succeed(*called, *FEW, "--tasks", *TASKS)
    by_tasks = load(models / "out")
    succeed(*called)
    found, base = load(models / "out"), load(models / "base")
    assert any(not torch.equal(found[name], base[name]) for name in base)
    for name, tensor in by_tasks.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-7)
    record = json.loads((models / "out" / "deltafl.json").read_text())
    names = [{"task": task, "examples": 20, "seed": 3} for task in ("digits", "digits_thick")]
    assert (record["statistics"], record["examples"]) == (names, 20)
    assert not (models / "out.layers").exists()


def test_the_ridge_is_that_of_the_number_of_examples(models: Path) -> None:
    """20 examples: 0.01, as with --tasks and --examples 20."""
    called = merge(models, "--method", "regmean")
    succeed(*called, "--ridge", 0.01)
    given = load(models / "out")
    succeed(*called)
    assert all(torch.equal(tensor, given[name]) for name, tensor in load(models / "out").items())


def test_a_note_says_what_was_counted_and_each_part_is_one_map(models: Path) -> None:
    folder = models / "m0" / "statistics" / "gram"
    note = json.loads((folder / "statistics.json").read_text())
    assert note.keys() == {
        *("kind", "model", "task", "examples", "seed", "tensors", "versions"),
    }
    weights = load(models / "m0")
    for number, (name, bias) in enumerate(note["tensors"].items(), 1):
        (found,) = load_file(folder / f"{number:05d}.safetensors").items()
        width = weights[name][0].numel() + (bias is not None)
        assert (found[0], found[1].shape, found[1].dtype) == (
            name,
            (1, width, width),
            torch.float64,
        )
        assert bias is None or bias in weights
    assert len(note["tensors"]) == len(list(folder.iterdir())) - 1 == 1 + 2 * 6


@pytest.mark.parametrize("kind", KINDS)
def test_language_models_have_statistics_of_tokens(tmp_path: Path, kind: str) -> None:
    (tmp_path / "base").mkdir()
    net = tiny_llama(tmp_path / "base")
    net.save(tmp_path / "base")
    lines = [f"lines:{write_lines(tmp_path / name)}" for name in ("a", "b")]
    for i, task in enumerate(lines):
        shutil.copytree(tmp_path / "base", tmp_path / f"m{i}")
        for parameter in net.module.parameters():
            parameter.data += 0.05 * torch.randn_like(parameter)
        net.save(tmp_path / f"m{i}")
        made = ("--model", tmp_path / f"m{i}", "--task", task, "--kind", kind)
        succeed("statistics", *made, "--examples", 8)
    called = merge(tmp_path, "--method", KINDS[kind])
    succeed(*called)
    found = load(tmp_path / "out")
    succeed(*called, "--tasks", *lines, "--examples", 8)
    for name, tensor in load(tmp_path / "out").items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-7)


def note_of(**changes: object) -> Callable[[Path], object]:
    def change(root: Path) -> None:
        file = root / "m1/statistics/gram/statistics.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return change


def part(
    change: Callable[[str, torch.Tensor], dict[str, torch.Tensor]],
) -> Callable[[Path], object]:
    def changed(root: Path) -> None:
        file = root / "m1/statistics/gram/00002.safetensors"
        ((name, tensor),) = load_file(file).items()
        save_file(change(name, tensor), file)

    return changed


def truncated(root: Path) -> None:
    file = root / "m1/statistics/gram/00003.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def fewer(root: Path) -> None:
    """Those of the second model lack the last map."""
    file = root / "m1/statistics/gram/statistics.json"
    note = json.loads(file.read_text())
    note["tensors"].popitem()
    file.write_text(json.dumps(note))


def other_kind(root: Path) -> None:
    shutil.rmtree(root / "m1/statistics/gram")
    (root / "m1/statistics/fisher").rename(root / "m1/statistics/gram")


def other_model(root: Path) -> None:
    shutil.rmtree(root / "m1/statistics")
    shutil.copytree(root / "m0/statistics", root / "m1/statistics")


ANEW = "; make it anew with `deltafl statistics`"
NOTE = 'm1/statistics/gram/statistics.json"'
WRONG: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "none": (
        lambda root: shutil.rmtree(root / "m1/statistics"),
        "",
        'm1/statistics/gram", which `deltafl statistics --kind gram` writes',
    ),
    "kind": (other_kind, "", f"{NOTE}: differs from this merge in kind{ANEW}"),
    "only kind": (note_of(kind="fisher"), "", f"{NOTE}: differs from this merge in kind{ANEW}"),
    "model": (other_model, "", f"{NOTE}: differs from this merge in model{ANEW}"),
    "examples": (
        note_of(),
        "--examples 21",
        'm0/statistics/gram/statistics.json": differs from this merge in examples',
    ),
    "seed": (note_of(seed=4), "--seed 3", f"{NOTE}: differs from this merge in seed{ANEW}"),
    "shape": (
        part(lambda name, tensor: {name: tensor[:, :-1, :-1].contiguous()}),
        "",
        '00002.safetensors": holds no gram of "encoder',
    ),
    "flat": (part(lambda name, tensor: {name: tensor[0].clone()}), "", "holds no gram of"),
    "name": (part(lambda name, tensor: {"x": tensor}), "", "holds no gram of"),
    "two": (part(lambda name, tensor: {name: tensor, "x": tensor + 1}), "", "holds no gram of"),
    "truncated": (truncated, "", '00003.safetensors": truncated'),
    "part": (
        lambda root: (root / "m1/statistics/gram/00003.safetensors").unlink(),
        "",
        '00003.safetensors": No such file',
    ),
    "maps": (fewer, "", 'm1/statistics/gram": of other tensors than beside the first model'),
    "key": (note_of(odd=1), "", f'{NOTE}: unknown key "odd"'),
    "value": (note_of(examples="many"), "", f"{NOTE}: examples: must be"),
    "json": (
        lambda root: (root / "m1/statistics/gram/statistics.json").write_text("["),
        "",
        f"{NOTE}: is not a JSON object",
    ),
}


@pytest.mark.parametrize(("change", "options", "told"), WRONG.values(), ids=WRONG)
def test_statistics_that_do_not_fit_are_one_line(world: Path, change, options, told) -> None:
    change(world)
    problem = refusal(world, *merge(world, "--method", "regmean", *options.split()))
    assert told in problem


def test_fisher_of_another_shape_is_one_line(world: Path) -> None:
    file = next((world / "m1/statistics/fisher").glob("00004*"))
    ((name, tensor),) = load_file(file).items()
    save_file({name: tensor[:-1].clone()}, file)
    problem = refusal(world, *merge(world, "--method", "fisher"))
    assert f'{file.name}": holds no fisher of "{name}"' in problem


@pytest.mark.parametrize("method", ["regmean++", "sequential_regression", "learned"])
def test_methods_that_run_the_merged_model_need_tasks(models: Path, method: str) -> None:
    told = refused(models, *merge(models, "--method", method))
    assert told == [f'model "m{i}": {method} needs its task; name it with --tasks' for i in (0, 1)]


BAD = {
    "--examples 99999 --out OUT": "fewer than 99999; lower --examples",
    "--examples 0": "examples: must be greater than or equal to 1",
    "--kind grams": 'kind: unknown "grams"; did you mean "gram"?',
    "--overwrite --task none/such": "none/such",
    "--model none": '"none": no such file or folder',
    "": "exists; choose another --out, or replace it with --overwrite",
    "--out MODEL --overwrite": "is, or holds, the input",
}


@pytest.mark.parametrize(("options", "told"), BAD.items(), ids=BAD)
def test_statistics_that_cannot_be_made_are_one_line(models: Path, options: str, told) -> None:
    places = {"OUT": str(models / "new"), "MODEL": str(models / "m0")}
    called = ("--model", models / "m0", "--task", "digits", "--kind", "gram")
    given = [places.get(word, word) for word in options.split()]
    assert told in refusal(models, "statistics", *called, *given)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_stopped_leaves_nothing(
    world: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, write = files_in(world), examples.write_atomically

    def stopped(path: Path, data: bytes) -> None:
        if path.name == "00003.safetensors":
            raise KeyboardInterrupt
        write(path, data)

    monkeypatch.setattr(examples, "write_atomically", stopped)
    model = str(world / "m0")
    recipe = StatisticsRecipe.of(model=model, task="digits", kind=kind, examples=4, overwrite=True)
    with pytest.raises(KeyboardInterrupt):
        write_statistics(recipe)
    assert files_in(world) == before
    monkeypatch.undo()
    write_statistics(recipe)
    note = json.loads((world / f"m0/statistics/{kind}/statistics.json").read_text())
    assert note["examples"] == 4
