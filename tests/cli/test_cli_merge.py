"""`deltafl merge` from the outside: what it refuses, and how; what it does otherwise."""

import hashlib
import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from jinja2.filters import do_filesizeformat
from safetensors.torch import save_file
from torch import Tensor

from checkpoint_files import (
    World,
    cli,
    files_in,
    load,
    make_world,
    patch_header,
    problems_of,
    refusal,
    refused,
    save,
    succeed,
    toy,
    tuned,
)
from deltafl.checkpoints.layout import fingerprint, read_layout
from deltafl.rules.building import load_rules
from deltafl.rules.rule import parameters


def record_of(folder: Path) -> dict:
    return json.loads((folder / "deltafl.json").read_text())


# What a merge does


def test_a_merge_is_the_base_plus_the_scaled_sum_of_the_deltas(tmp_path: Path):
    """Negative weights subtract; integers and booleans come from the base, which is told."""
    base = toy() | {"mask": torch.tensor([True, False])}
    models = [tuned(base, i) | {"mask": torch.tensor([False, False])} for i in range(2)]
    paths = [save(tmp_path / f"m{i}", model) for i, model in enumerate(models)]
    called = ("merge", "--base", save(tmp_path / "base", base), "--models", *paths)
    for i, (weights, signs) in enumerate((((), (1, 1)), (("--weights", -1, 1), (-1, 1)))):
        out = tmp_path / f"out{i}"
        said = succeed(*called, *weights, "--scaling-coef", 0.3, "--out", out).out
        merged = load(out)
        assert set(merged) == set(base)
        for name, theta in base.items():
            start, ends = theta.double(), [model[name].double() for model in models]
            moved = sum(sign * (end - start) for sign, end in zip(signs, ends, strict=True))
            wanted = start + 0.3 * moved if theta.is_floating_point() else start
            # to a few float32 ulps
            torch.testing.assert_close(merged[name].double(), wanted, rtol=2e-7, atol=2e-7)
    copied = {"not a float tensor (I64)": ["steps"], "not a float tensor (BOOL)": ["mask"]}
    assert record_of(out)["copied"] == copied
    assert all(f"copied from the base: 1 tensors ({why})" in said for why in copied)


SAME = {
    "lambda is server_lr / n": ("--scaling-coef 0.25", "--server-lr 0.5", {}),
    "weights of their own": ("--weights -0.5 1e0", "--weights=-0.5 1", {}),
    "each model after its option": ("", "--models M0 --models M1", {}),
    "a file": (
        "--method fedgma --rho 0.6 --scaling-coef 0.3 --weights 1 2 --threads 1",
        "",
        {"method": "fedgma", "rho": 0.6, "scaling_coef": 0.3, "weights": [1, 2]},
    ),
    "options go before the file": (
        "--server-lr 0.5 --weights 1 1",
        "--server-lr 0.5 --weights 1 1",
        {"scaling_coef": 9.0, "out": "unused", "weights": [5, 5]},
    ),
}


@pytest.mark.parametrize(("one", "other", "file"), SAME.values(), ids=SAME)
def test_two_ways_to_say_one_merge_give_the_same_bits(world: World, one, other, file):
    base, *models = (str(world.root / name) for name in ("base", "m0", "m1"))
    succeed(*world.args, *one.split())
    other = other.replace("M0", models[0]).replace("M1", models[1])
    given = {"base": base, "models": [models[0], {"path": models[1]}], **file}
    (world.root / "r.yaml").write_text(yaml.safe_dump(given))
    succeed("merge", world.root / "r.yaml", *other.split(), "--out", world.root / "other")
    assert world.file("out").read_bytes() == world.file("other").read_bytes()
    (one, two) = (record_of(world.root / name) for name in ("out", "other"))
    assert (one["server_lr"], one["scaling_coef"]) == (two["server_lr"], two["scaling_coef"])
    assert not (world.root / "unused").exists()


def test_a_dry_run_prints_the_plan_and_writes_nothing(world: World):
    before = files_in(world.root)
    outcome = succeed(*world.args, "--method", "ties", "--dry-run")
    assert files_in(world.root) == before
    held = sum(world.file(name).stat().st_size for name in ("base", "m0", "m1"))
    elements = sum(t.numel() for t in world.base.values() if t.is_floating_point())
    assert f"5 merged ({elements:,} elements)" in outcome.out
    assert f"read: {2 * held / 1e6:.1f} MB in 2 passes over 3 checkpoints" in outcome.out
    assert f"write: {do_filesizeformat(sum(t.nbytes for t in world.base.values()))}" in outcome.out
    assert "memory: about" in outcome.out
    assert not outcome.err


def test_the_record_says_what_went_in(world: World):
    succeed(*world.args, "--method", "cclip", "--rho", 0.5, "--hash")
    record = record_of(world.out)
    assert (record["method"], record["params"]) == ("cclip", {"rho": 0.5})
    base, models = record["base"], record["models"]
    assert base["ref"] == str(world.root / "base")
    assert base["bytes"] == world.file("base").stat().st_size
    for told, name in zip((base, *models), ("base", "m0", "m1"), strict=True):
        digest = hashlib.sha256(world.file(name).read_bytes()).hexdigest()
        assert told["sha256"] == {"model.safetensors": digest}
    assert models[0]["header_sha256"] == base["header_sha256"]
    assert models[0]["fingerprint"] != base["fingerprint"]
    assert record["versions"]["torch"] == torch.__version__
    (world.out / "notes.txt").write_text("old")
    assert succeed(*world.args, "--overwrite").err == "", "off a terminal nothing is drawn"
    assert sorted(files_in(world.out)) == [
        "README.md", "config.json", "deltafl.json", "model.safetensors"
    ]  # fmt: skip
    assert record_of(world.out)["base"]["sha256"] is None
    outcome = succeed(*world.args, "--quiet", "--overwrite")
    assert (outcome.out, outcome.err) == ("", "")


def test_steps_and_examples_come_from_training_json_unless_given(world: World):
    for i in range(2):
        facts = {"num_steps": 100 * (i + 1), "num_examples": 7}
        (world.root / f"m{i}" / "training.json").write_text(json.dumps(facts))
    # FedNova, equal p: c_i = mean(tau) / (n tau_i), methods.md section 2
    for given, wanted in (((), [0.75, 0.375]), (("--num-steps", 10, 10), [0.5, 0.5])):
        succeed(*world.args, "--method", "fednova", *given, "--overwrite")
        assert record_of(world.out)["coefficients"] == pytest.approx(wanted)


def test_rules_lists_every_method_with_its_parameters():
    told, rules = succeed("rules").out, load_rules()
    for name in rules:
        assert f"\n{name}\n" in "\n" + told
        one = succeed("rules", name).out
        assert all(f"--{key.replace('_', '-')}" in one for key in parameters(rules[name]))
        assert "native scale: " in one
    assert problems_of(cli("rules", "fedgm")) == ['unknown method "fedgm"; did you mean "fedgma"?']


# Bad input: one clear line, exit code 2, nothing written

Change = Callable[[World], object]


def changed(model: str, name: str, to: Callable[[Tensor], Tensor] | None) -> Change:
    """A change on disk: a tensor of a model is another one, or missing."""

    def change(world: World) -> None:
        held = load(world.root / model)
        tensor = held.pop(name, torch.ones(2))
        save_file(held | ({} if to is None else {name: to(tensor)}), world.file(model))

    return change


def raw(change: Callable[[bytes], bytes], model: str = "m0") -> Change:
    """A change of the bytes of a file."""
    return lambda world: world.file(model).write_bytes(change(world.file(model).read_bytes()))


def header(change: Callable[[dict], object]) -> Change:
    return lambda world: patch_header(world.file("m0"), change)


def embed(**changes: object) -> Change:
    return header(lambda h: h["embed.weight"].update(changes))


def written(path: str, text: str) -> Change:
    return lambda world: (world.root / path).write_text(text)


def everywhere(name: str, to: Callable[[Tensor], Tensor]) -> Change:
    return lambda world: [changed(m, name, to)(world) for m in ("base", "m0", "m1")]


def float8(tensor: Tensor) -> Tensor:
    return tensor.to(torch.float8_e4m3fn)


BIAS, EMBED = "layer.0.bias", "embed.weight"
CORRUPT = r'".*m0/model\.safetensors": .*corrupt'
NO_FILE = CORRUPT + "|truncated or not a safetensors file"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
TRAINING = (
    '{|[]|{"num_steps": "many"}|{"num_steps": true}|{"num_steps": 1.5}|{"base": "x"}|{"lr": []}'
)

FILES: list[tuple[Change, str]] = [
    (changed("m1", BIAS, None), f'model "m1": lacks "{BIAS}" of the base.*--exclude'),
    (changed("m0", "x", torch.clone), 'model "m0": has "x", which the base lacks'),
    (
        changed("m0", BIAS, lambda t: t[:7].clone()),
        rf'model "m0": tensor "{BIAS}" is \(7,\), the base has \(8,\)',
    ),
    (
        changed("m1", EMBED, lambda t: torch.ones(11, 8)),
        rf'model "m1": "{EMBED}": 11 rows, the base has 9; another vocabulary\? Find .*--vocabulary.*--exclude$',
    ),
    (changed("m1", EMBED, float8), f'model "m1": F8_E4M3 where the base has F32: "{EMBED}"'),
    (everywhere(EMBED, float8), rf'the base is quantised \(F8_E4M3\): "{EMBED}"; '),
    (changed("m0", BIAS, Tensor.long), f'model "m0": I64 where the base has F32: "{BIAS}"'),
    *(
        (raw(lambda b, keep=keep: b[:keep], name), f'".*{name}/model.*truncated.*download it again')
        for name in ("base", "m1")
        for keep in (0, 5, 100, -1)
    ),
    (raw(lambda b: b + b"x"), "truncated, corrupt"),
    (raw(lambda b: b[:8] + b"?" + b[9:]), CORRUPT),
    (raw(lambda b: b[:9] + b"\xff\xfe" + b[11:]), CORRUPT),
    (raw(lambda b: b"\xff" * 8 + b[8:]), NO_FILE),
    (raw(lambda b: (200_000).to_bytes(8, "little") + b"[" * 200_000), NO_FILE),
    (raw(lambda b: (2).to_bytes(8, "little") + b"[]"), NO_FILE),
    (raw(lambda b: POINTER), NO_FILE),
    (header(lambda h: h[EMBED].update(data_offsets=h[BIAS]["data_offsets"])), CORRUPT),
    (embed(shape=[8, 8]), CORRUPT),
    (embed(shape=[-9, -8]), CORRUPT),
    (header(lambda h: h[EMBED].pop("shape")), CORRUPT),
    (header(lambda h: h.update(odd=5)), CORRUPT),
    (header(lambda h: h.pop(EMBED)), CORRUPT),
    (embed(data_offsets=[288, 0]), CORRUPT),
    (
        embed(dtype="F8_E8M0", shape=[288]),
        f'tensor "{EMBED}" has dtype F8_E8M0, which is not supported',
    ),
    *((written("m1/training.json", t), '".*m1/training.json": ') for t in TRAINING.split("|")),
]
"""What is wrong on disk, and the line that says so."""


@pytest.mark.parametrize(("change", "told"), FILES)
def test_a_file_that_cannot_be_merged_is_one_line(world: World, change: Change, told: str):
    change(world)
    assert re.search(told, refusal(world.root, *world.args))


def test_a_tensor_that_cannot_be_merged_can_be_left_out(world: World):
    everywhere(EMBED, float8)(world)
    changed("m1", BIAS, None)(world)
    succeed(*world.args, "--exclude", EMBED, BIAS)


OPTIONS: dict[str, str] = {
    "--scaling-coeff 0.3": "--scaling-coeff.*--scaling-coef[^f]",
    "--method fedgm": 'unknown method "fedgm"; did you mean "fedgma"\\?$',
    "--method median --rho 0.5": 'method median has no parameter "rho"',
    "--rho 0.5": 'method task_arithmetic has no parameter "rho"; there is none$',
    "--method fedgma": "method fedgma needs --rho$",
    "--method fedgma --rho 2": "rho is 2",
    "--server-lr 1 --scaling-coef 0.3": "server_lr and scaling_coef",
    "--server-lr nan": "server_lr: must be a finite number",
    "--scaling-coef inf": "scaling_coef: must be a finite number",
    "--weights 1 2 3": "weights: 3 given for 2 models",
    "--num-steps 1 2 3": "num_steps: 3 given for 2 models",
    "--num-examples 1 2 3": "num_examples: 3 given for 2 models",
    "--weights nan 1 --dry-run": "weights.0: must be a finite number",
    "--weights 0 0 --dry-run": "weights: all are 0",
    "--method fednova --num-steps 0 5": "number of local steps is 0",
    "--exclude layr.*": 'pattern "layr.\\*" matches no tensor',
    "--scope visual": '--scope "visual" matches no tensor',
    "--base none": '"none": no such file or folder',
    "--config none.yaml": '"none.yaml": No such file',
}
"""What is wrong among the options, and the line that says so."""
if not torch.cuda.is_available():
    OPTIONS["--device cuda"] = "--device cuda"


@pytest.mark.parametrize(("options", "told"), OPTIONS.items(), ids=OPTIONS)
def test_options_that_mean_nothing_are_one_line(world: World, options: str, told: str):
    assert re.search(told, refusal(world.root, *world.args, *options.split()))


def test_what_is_needed_is_named_by_its_option(world: World):
    m0, base, out = (world.root / name for name in ("m0", "base", "out"))
    assert "--base" in refusal(world.root, "merge", "--models", m0, "--out", out)
    assert "--models" in refusal(world.root, "merge", "--base", base, "--out", out)
    assert "--out" in refusal(world.root, *world.args[:-2])
    assert 'did you mean "merge"?' in refusal(world.root, "merg")


OUTSIDE = ("../m1/model.safetensors", "/etc/passwd", "..", "sub/x.safetensors")
FIRST, SECOND = (f"model-0000{i}-of-00002.safetensors" for i in (1, 2))


def test_an_index_that_is_broken_or_disagrees_or_points_outside_is_one_line(world: World):
    odd = save(world.root / "odd", world.models[0], shards=2)
    index, called = odd / "model.safetensors.index.json", (*world.args, "--models", odd)
    held = json.loads(index.read_text())["weight_map"]

    def said(weight_map: object) -> str:
        index.write_text(json.dumps({"weight_map": weight_map}))
        return refusal(world.root, *called)

    for name in OUTSIDE:
        told = f'"{index}": the shard "{name}" is not in its folder; download it again'
        assert said(held | {BIAS: name}) == told
    assert f'disagree about "{EMBED}"' in said(held | {EMBED: SECOND})
    tensors = load(odd)
    save_file(
        {n: tensors[n] for n in (*held, EMBED) if held[n] == SECOND or n == EMBED}, odd / SECOND
    )
    assert "disagree about" in said(held | {EMBED: FIRST})
    (odd / SECOND).unlink()
    assert f'the shard "{SECOND}" is not in its folder' in said(held)
    for text in ("{", "[]", "{}", '{"weight_map": 5}', '{"weight_map": {"a": 5}}'):
        index.write_text(text)
        assert re.match(f'"{index}": .*not an index', refusal(world.root, *called))


# What fits, or not, together


def test_a_fine_tune_of_another_base_is_refused_unless_insisted_and_a_far_one_warned_of(
    world: World,
):
    def trained_on(name: str) -> None:
        base = {"id": "the/other", "fingerprint": fingerprint(read_layout(world.root / name))}
        (world.root / "m1/training.json").write_text(json.dumps({"base": base}))

    trained_on("m0")
    problem = refusal(world.root, *world.args)
    assert problem.startswith('model "m1": was fine-tuned from another base ("the/other")')
    assert "--allow-other-base" in problem
    assert "another base" in succeed(*world.args, "--allow-other-base").out
    trained_on("base")
    assert "another base" not in succeed(*world.args, "--overwrite").out
    far = save(world.root / "far", tuned(world.base, 5, scale=1.0))
    outcome = succeed(*world.args, "--models", far, "--quiet", "--overwrite")
    assert re.fullmatch('warning: model "far": its delta is .*\n', outcome.err)
    assert "far" in str(record_of(world.out)["warnings"])


def test_without_weights_or_a_common_float_tensor_there_is_no_merge(world: World):
    (world.root / "empty").mkdir()
    assert "no weights" in refusal(world.root, *world.args, "--base", world.root / "empty")
    base, model = (save(world.root / f"i{i}", {"steps": torch.tensor([i])}) for i in (1, 2))
    called = ("merge", "--base", base, "--models", model, "--out", world.out)
    problem = refusal(world.root, *called)
    assert problem == "base and models have no float tensor in common; is this the right base?"


def test_every_problem_of_every_model_is_reported_at_once(tmp_path: Path):
    world = make_world(tmp_path, 5)
    changed("m0", BIAS, None)(world)
    changed("m1", EMBED, lambda t: torch.ones(11, 8))(world)
    changed("m1", "odd", torch.clone)(world)
    raw(lambda b: b[:-4], "m2")(world)
    world.file("m3").unlink()
    (world.root / "m3/model.bin").write_bytes(b"PK\x03\x04 no zip")
    changed("m4", BIAS, Tensor.int)(world)
    problems = refused(world.root, *world.args, "--method", "fedgm")
    for part in (
        'unknown method "fedgm"', 'model "m0": lacks', f'model "m1": "{EMBED}"', 'model "m1": has "',
        str(world.file("m2")), "model.bin", 'model "m4"',
    ):  # fmt: skip
        assert sum(part in p for p in problems) == 1, (part, problems)
    assert len(problems) == 7


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_file_without_permission_is_an_error(world: World):
    world.file("m0").chmod(0)
    assert "cannot read or write" in refusal(world.root, *world.args)


@pytest.mark.parametrize("name", ["base", "m0", "m1", ".", "m0/../m1", "link"])
def test_an_output_that_is_an_input_is_refused(world: World, name: str):
    (world.root / "link").symlink_to("m1")
    problem = refusal(world.root, *world.args, "--out", world.root / name, "--overwrite")
    assert "is, or holds, the input" in problem or "does not look like a model" in problem
