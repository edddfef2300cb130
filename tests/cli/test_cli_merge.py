"""`deltafl merge` from the outside: what it refuses, and how; what it does otherwise."""

import hashlib
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor

from checkpoint_files import (
    World,
    cli,
    files_in,
    load,
    make_world,
    mean_step,
    patch_header,
    problems_of,
    refusal,
    refused,
    save,
    succeed,
    toy,
    tuned,
)  # fmt: skip
from deltafl.checkpoints.layout import fingerprint, read_layout
from deltafl.rules.rule import load_rules, parameters
from deltafl.sizes import as_bytes


@pytest.fixture
def world(tmp_path: Path) -> World:
    return make_world(tmp_path)


# What a merge does


def test_a_merge_is_the_base_plus_the_scaled_sum_of_the_deltas(world: World) -> None:
    succeed(*world.args, "--scaling-coef", 0.3)
    merged, wanted = load(world.out), mean_step(world.base, world.models, 0.3)
    assert set(merged) == set(world.base)
    for name, values in wanted.items():
        np.testing.assert_allclose(
            merged[name].double().numpy(), values, rtol=2e-7, atol=2e-7
        )  # a few float32 ulps


def test_server_lr_is_lambda_times_the_number_of_models(world: World) -> None:
    succeed(*world.args, "--scaling-coef", 0.25, "--out", world.root / "sum")
    succeed(*world.args, "--server-lr", 0.5, "--out", world.root / "mean")
    assert world.file("sum").read_bytes() == world.file("mean").read_bytes()
    records = [json.loads((world.root / n / "deltafl.json").read_text()) for n in ("sum", "mean")]
    assert [(r["server_lr"], r["scaling_coef"]) for r in records] == [(0.5, 0.25)] * 2


def test_integers_come_from_the_base_and_are_listed(world: World) -> None:
    outcome = succeed(*world.args)
    assert torch.equal(load(world.out)["steps"], world.base["steps"])
    record = json.loads((world.out / "deltafl.json").read_text())
    assert record["copied"] == {"not a float tensor (I64)": ["steps"]}
    assert "copied from the base: 1 tensors (not a float tensor (I64))" in outcome.out


def test_bool_tensors_come_from_the_base(tmp_path: Path) -> None:
    base = toy() | {"mask": torch.tensor([True, False])}
    save(tmp_path / "base", base)
    save(tmp_path / "m", tuned(base, 0) | {"mask": torch.tensor([False, False])})
    succeed(
        "merge", "--base", tmp_path / "base", "--models", tmp_path / "m", "--out", tmp_path / "out"
    )
    assert load(tmp_path / "out")["mask"].tolist() == [True, False]


def test_models_can_be_listed_after_one_option_or_each_after_its_own(world: World) -> None:
    base, m0, m1 = (world.root / n for n in ("base", "m0", "m1"))
    one = ("merge", "--base", base, "--models", m0, m1, "--weights", -0.5, "1e0")
    each = ("merge", "--base", base, "--models", m0, "--models", m1, "--weights=-0.5", 1)
    succeed(*one, "--out", world.root / "a")
    succeed(*each, "--out", world.root / "b")
    assert world.file("a").read_bytes() == world.file("b").read_bytes()


def test_a_negative_weight_subtracts_a_model(world: World) -> None:
    succeed(*world.args, "--weights", -1, 1, "--scaling-coef", 0.5)
    merged = load(world.out)
    for name, theta in world.base.items():
        if theta.is_floating_point():
            want = theta.double() + 0.5 * (
                world.models[1][name].double() - world.models[0][name].double()
            )
            torch.testing.assert_close(merged[name].double(), want, rtol=2e-7, atol=2e-7)


def test_a_recipe_gives_the_same_bits_as_the_flags(world: World) -> None:
    options = ("--method", "fedgma", "--rho", 0.6, "--scaling-coef", 0.3, "--weights", 1, 2)
    succeed(*world.args, *options, "--threads", 1)
    recipe = {
        "base": str(world.root / "base"), "models": [str(world.root / "m0"), {"path": str(world.root / "m1")}],
        "method": "fedgma", "rho": 0.6, "scaling_coef": 0.3, "weights": [1, 2], "out": str(world.root / "recipe"),
    }  # fmt: skip
    (world.root / "r.yaml").write_text(yaml.safe_dump(recipe))
    succeed("merge", world.root / "r.yaml")
    assert (world.root / "recipe/model.safetensors").read_bytes() == world.file("out").read_bytes()


def test_flags_go_before_the_recipe(world: World) -> None:
    recipe = {
        "base": str(world.root / "base"),
        "models": [str(world.root / "m0"), str(world.root / "m1")],
    }
    recipe |= {"scaling_coef": 9.0, "out": str(world.root / "unused"), "weights": [5, 5]}
    (world.root / "r.yaml").write_text(yaml.safe_dump(recipe))
    succeed(
        "merge", world.root / "r.yaml", "--server-lr", 0.5, "--out", world.out, "--weights", 1, 1
    )
    succeed(*world.args, "--server-lr", 0.5, "--out", world.root / "flags")
    assert world.file("out").read_bytes() == (world.root / "flags/model.safetensors").read_bytes()
    assert not (world.root / "unused").exists()


def test_a_dry_run_prints_the_plan_and_writes_nothing(world: World) -> None:
    before = files_in(world.root)
    outcome = succeed(*world.args, "--method", "ties", "--dry-run")
    assert files_in(world.root) == before
    held = [
        sum(f.stat().st_size for f in world.root.glob(f"{n}/*.safetensors"))
        for n in ("base", "m0", "m1")
    ]
    elements = sum(t.numel() for t in world.base.values() if t.is_floating_point())
    assert f"5 merged ({elements:,} elements)" in outcome.out
    assert f"read: {2 * sum(held) / 1e6:.1f} MB in 2 passes over 3 checkpoints" in outcome.out
    assert f"write: {as_bytes(sum(t.nbytes for t in world.base.values()))}" in outcome.out
    assert "memory: about" in outcome.out
    assert not outcome.err


def test_the_record_says_what_went_in(world: World) -> None:
    succeed(*world.args, "--method", "cclip", "--rho", 0.5, "--hash")
    record = json.loads((world.out / "deltafl.json").read_text())
    assert record["method"] == "cclip"
    assert record["params"] == {"rho": 0.5}
    assert record["base"]["ref"] == str(world.root / "base")
    assert record["base"]["bytes"] == world.file("base").stat().st_size
    for said, name in (
        (record["base"], "base"),
        (record["models"][0], "m0"),
        (record["models"][1], "m1"),
    ):
        assert said["sha256"] == {
            "model.safetensors": hashlib.sha256(world.file(name).read_bytes()).hexdigest()
        }
    succeed(*world.args, "--overwrite")
    assert json.loads((world.out / "deltafl.json").read_text())["base"]["sha256"] is None
    assert record["models"][0]["header_sha256"] == record["base"]["header_sha256"]
    assert record["models"][0]["fingerprint"] != record["base"]["fingerprint"]
    assert record["versions"]["torch"] == torch.__version__


def test_steps_and_examples_come_from_training_json_unless_given(tmp_path: Path) -> None:
    base = toy()
    save(tmp_path / "base", base)
    for i in range(2):
        save(
            tmp_path / f"m{i}",
            tuned(base, i),
            training={"num_steps": 100 * (i + 1), "num_examples": 7},
        )
    models = (tmp_path / "m0", tmp_path / "m1")
    args = ("merge", "--base", tmp_path / "base", "--models", *models, "--method", "fednova")
    succeed(*args, "--out", tmp_path / "out")
    # FedNova, equal p: c_i = mean(tau) / (n tau_i), methods.md section 2
    assert json.loads((tmp_path / "out/deltafl.json").read_text())["coefficients"] == pytest.approx(
        [0.75, 0.375]
    )
    succeed(*args, "--out", tmp_path / "given", "--num-steps", 10, 10)
    assert json.loads((tmp_path / "given/deltafl.json").read_text())[
        "coefficients"
    ] == pytest.approx([0.5, 0.5])


def test_off_a_terminal_nothing_is_drawn_and_quiet_says_nothing(world: World) -> None:
    assert succeed(*world.args).err == ""
    outcome = succeed(*world.args, "--quiet", "--overwrite")
    assert (outcome.out, outcome.err) == ("", "")


def test_rules_lists_every_method_with_its_parameters() -> None:
    told = succeed("rules").out
    rules = load_rules()
    for name in rules:
        assert f"\n{name}\n" in "\n" + told
        one = succeed("rules", name).out
        for key in parameters(rules[name]):
            assert f"--{key.replace('_', '-')}" in one
        assert "native scale: " in one


def test_rules_offers_the_right_name_for_a_misspelt_one() -> None:
    assert problems_of(cli("rules", "fedgm")) == ['unknown method "fedgm"; did you mean "fedgma"?']


# Bad input: one clear line, exit code 2, nothing written


def changed(
    model: str, name: str, to: Callable[[Tensor], Tensor] | None
) -> Callable[[World], None]:
    """A change on disk: a tensor of a model is another one, or missing."""

    def change(world: World) -> None:
        held = load(world.root / model)
        tensor = held.pop(name, torch.ones(2))
        save_file(held | ({} if to is None else {name: to(tensor)}), world.file(model))

    return change


def cut(model: str, keep: int) -> Callable[[World], None]:
    """A change on disk: a file that ends too early."""
    return lambda world: bytes_of(world, model, lambda raw: raw[:keep])


def bytes_of(world: World, model: str, change: Callable[[bytes], bytes]) -> None:
    world.file(model).write_bytes(change(world.file(model).read_bytes()))


def raw(change: Callable[[bytes], bytes]) -> Callable[[World], None]:
    return lambda world: bytes_of(world, "m0", change)


def header(change: Callable[[Any], object]) -> Callable[[World], None]:
    return lambda world: patch_header(world.file("m0"), change)


def written(path: str, text: str) -> Callable[[World], None]:
    def change(world: World) -> None:
        (world.root / path).write_text(text)

    return change


def everywhere(name: str, to: Callable[[Tensor], Tensor]) -> Callable[[World], None]:
    return lambda world: [changed(m, name, to)(world) for m in ("base", "m0", "m1")] and None


def float8(tensor: Tensor) -> Tensor:
    return tensor.to(torch.float8_e4m3fn)


CORRUPT = r'".*m0/model\.safetensors": .*corrupt'
NO_FILE = CORRUPT + "|truncated or not a safetensors file"

FILES: dict[str, tuple[Callable[[World], None], str]] = {
    "missing": (
        changed("m1", "layer.0.bias", None),
        'model "m1": lacks "layer.0.bias" of the base.*--exclude',
    ),
    "extra": (
        changed("m0", "layer.1.weight", torch.clone),
        'model "m0": has "layer.1.weight", which the base lacks',
    ),
    "shape": (
        changed("m0", "layer.0.bias", lambda t: t[:7].clone()),
        r'model "m0": tensor "layer.0.bias" is \(7,\), the base has \(8,\)',
    ),
    "vocabulary": (
        changed("m1", "embed.weight", lambda t: torch.ones(11, 8)),
        r'model "m1": tensor "embed.weight" is \(11, 8\), the base has \(9, 8\); another vocabulary\?$',
    ),
    "quantised": (
        changed("m1", "embed.weight", float8),
        'model "m1": F8_E4M3 where the base has F32: "embed.weight"',
    ),
    "quantised base": (
        everywhere("embed.weight", float8),
        r'the base is quantised \(F8_E4M3\): "embed.weight"; ',
    ),
    "integer": (
        changed("m0", "layer.0.bias", torch.Tensor.long),
        'model "m0": I64 where the base has F32: "layer.0.bias"',
    ),
    **{
        f"{name} cut to {keep}": (
            cut(name, keep),
            f'".*{name}/model.safetensors": .*truncated.*download it again',
        )
        for name in ("base", "m1")
        for keep in (0, 5, 100, -1)
    },
    "bytes after the end": (raw(lambda b: b + b"x"), "truncated, corrupt"),
    "not json": (raw(lambda b: b[:8] + b"?" + b[9:]), CORRUPT),
    "not text": (raw(lambda b: b[:9] + b"\xff\xfe" + b[11:]), CORRUPT),
    "endless": (raw(lambda b: b"\xff" * 8 + b[8:]), NO_FILE),
    "deep": (raw(lambda b: (200_000).to_bytes(8, "little") + b"[" * 200_000), NO_FILE),
    "a list": (raw(lambda b: (2).to_bytes(8, "little") + b"[]"), NO_FILE),
    "git lfs pointer": (
        raw(lambda b: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"),
        NO_FILE,
    ),
    "overlap": (
        header(lambda h: h["embed.weight"].update(data_offsets=h["layer.0.bias"]["data_offsets"])),
        CORRUPT,
    ),
    "another shape": (header(lambda h: h["embed.weight"].update(shape=[8, 8])), CORRUPT),
    "negative shape": (header(lambda h: h["embed.weight"].update(shape=[-9, -8])), CORRUPT),
    "no shape": (header(lambda h: h["embed.weight"].pop("shape")), CORRUPT),
    "no tensor": (header(lambda h: h.update(odd=5)), CORRUPT),
    "a hole": (header(lambda h: h.pop("embed.weight")), CORRUPT),
    "backwards": (header(lambda h: h["embed.weight"].update(data_offsets=[288, 0])), CORRUPT),
    "unknown dtype": (
        header(lambda h: h["embed.weight"].update(dtype="F8_E8M0", shape=[288])),
        'tensor "embed.weight" has dtype F8_E8M0, which is not supported',
    ),
    **{
        f"training.json {text}": (written("m1/training.json", text), '".*m1/training.json": ')
        for text in (
            "{",
            "[]",
            '{"num_steps": "many"}',
            '{"num_steps": true}',
            '{"num_steps": 1.5}',
            '{"base": "x"}',
            '{"lr": []}',
        )
    },
}
"""What is wrong on disk, and the line that says so."""


@pytest.mark.parametrize(("change", "told"), list(FILES.values()), ids=list(FILES))
def test_a_file_that_cannot_be_merged_is_one_line(
    world: World, change: Callable[[World], None], told: str
) -> None:
    change(world)
    assert re.search(told, refusal(world.root, *world.args))


def test_a_tensor_that_cannot_be_merged_can_be_left_out(world: World) -> None:
    everywhere("embed.weight", float8)(world)
    changed("m1", "layer.0.bias", None)(world)
    succeed(*world.args, "--exclude", "embed.weight", "layer.0.bias")


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
    "--weights 1 2 3": "weights: 3 numbers for 2 models",
    "--num-steps 1 2 3": "num_steps: 3 numbers for 2 models",
    "--num-examples 1 2 3": "num_examples: 3 numbers for 2 models",
    "--weights nan 1 --dry-run": "weights.0: must be a finite number",
    "--weights 0 0 --dry-run": "weights: all are 0",
    "--method fednova --num-steps 0 5": "number of local steps is 0",
    "--exclude layr.*": 'pattern "layr.\\*" matches no tensor',
    "--scope visual": '--scope "visual" matches no tensor',
    "--base none": '"none": no such file or folder',
    "--config none.yaml": '"none.yaml": No such file',
}
"""What is wrong among the options, and the line that says so."""


@pytest.mark.parametrize(("options", "told"), list(OPTIONS.items()), ids=list(OPTIONS))
def test_options_that_mean_nothing_are_one_line(world: World, options: str, told: str) -> None:
    assert re.search(told, refusal(world.root, *world.args, *options.split()))


def test_what_is_needed_is_named_by_its_option(world: World) -> None:
    m0, base, out = (world.root / name for name in ("m0", "base", "out"))
    assert "--base" in refusal(world.root, "merge", "--models", m0, "--out", out)
    assert "--models" in refusal(world.root, "merge", "--base", base, "--out", out)
    assert "--out" in refusal(world.root, *world.args[:-2])
    assert 'did you mean "merge"?' in refusal(world.root, "merg")


METHODS = {
    "task_arithmetic": [], "median": [], "fedgma": ["--rho", 0.5], "cclip": ["--rho", 1], "ties": [],
    "dare": ["--drop-rate", 0.5], "geometric_median": [], "krum": [],
}  # fmt: skip


@pytest.mark.parametrize("method", list(METHODS))
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_inf_are_errors_that_name_tensor_and_model(
    tmp_path: Path, method: str, value: float
) -> None:
    world = make_world(tmp_path, 3)
    name = "layer.0.weight"

    def damage(tensor: Tensor) -> Tensor:
        tensor[7, 5:2000] = value  # long enough that random dropping cannot drop all of it
        return tensor

    changed("m1", name, damage)(world)
    problem = refusal(world.root, *world.args, "--method", method, *METHODS[method])
    assert problem.startswith(
        f'model "m1": tensor "{name}" differs from the base by NaN or Inf (element '
    )
    assert "--exclude" in problem
    succeed(*world.args, "--method", method, *METHODS[method], "--exclude", name)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("scaling_coef", "much"), ("server_lr", [1]), ("server_lr", True), ("models", "m0"), ("models", []),
        ("weights", "1 2"), ("num_steps", [1.5, 2]), ("rho", "high"), ("rho", True), ("exact", "perhaps"),
        ("threads", -1), ("dtype", "bf16"), ("max_shard_size", "5 apples"), ("max_shard_size", 0), ("include", "a*"),
        ("base", 5), ("out", 5),
    ],
)  # fmt: skip
def test_a_recipe_value_of_the_wrong_type_is_an_error_that_names_its_key(
    world: World, key: str, value: object
) -> None:
    recipe = {"base": "base", "models": ["m0", "m1"], "method": "fedgma", "rho": 0.5, key: value}
    (world.root / "r.yaml").write_text(yaml.safe_dump(recipe))
    problem = refusal(world.root, "merge", world.root / "r.yaml")
    assert problem.startswith((f"{key}: ", f"{key}.0: "))


# Folders of shards


@pytest.fixture
def odd(world: World) -> Path:
    """A model in two shards."""
    return save(world.root / "odd", world.models[0], shards=2)


def index_of(folder: Path, **weight_map: object) -> Path:
    """Change the index of a folder."""
    index = folder / "model.safetensors.index.json"
    held = json.loads(index.read_text())
    held["weight_map"] |= {key.replace("_", "."): value for key, value in weight_map.items()}
    index.write_text(json.dumps(held))
    return index


@pytest.mark.parametrize(
    "name", ["../m1/model.safetensors", "/etc/passwd", "..", "sub/x.safetensors"]
)
def test_an_index_that_points_outside_its_folder_is_not_followed(
    world: World, odd: Path, name: str
) -> None:
    index = index_of(odd, layer_0_bias=name)
    problem = refusal(world.root, *world.args, "--models", odd)
    assert (
        problem == f'"{index}": points outside its folder ("{name}"); do not trust this checkpoint'
    )


def test_shards_that_are_missing_or_disagree_are_named(world: World, odd: Path) -> None:
    second = "model-00002-of-00002.safetensors"
    index_of(odd, embed_weight=second)
    assert 'disagree about "embed.weight"' in refusal(world.root, *world.args, "--models", odd)
    index_of(odd, embed_weight="model-00001-of-00002.safetensors")
    held = load(odd)
    names = ("layer.0.weight", "embed.weight", "norm.weight", "steps")
    save_file({n: held[n] for n in names}, odd / second)
    assert "disagree about" in refusal(world.root, *world.args, "--models", odd)
    (odd / second).unlink()
    assert f'the shard "{second}" is missing' in refusal(world.root, *world.args, "--models", odd)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": 5}', '{"weight_map": {"a": 5}}'])
def test_a_broken_index_is_an_error(world: World, odd: Path, text: str) -> None:
    index = odd / "model.safetensors.index.json"
    index.write_text(text)
    problem = refusal(world.root, *world.args, "--models", odd)
    assert problem.startswith(f'"{index}": ')
    assert "not an index" in problem


def test_a_folder_without_weights_is_an_error(world: World) -> None:
    (world.root / "empty").mkdir()
    assert "no weights" in refusal(world.root, *world.args, "--base", world.root / "empty")


# What fits, or not, together


def test_a_fine_tune_of_another_base_is_refused_unless_insisted(world: World) -> None:
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


def test_a_delta_as_large_as_the_base_is_warned_of(world: World) -> None:
    save(world.root / "far", tuned(world.base, 5, scale=1.0))
    outcome = succeed(*world.args, "--models", world.root / "m0", world.root / "far", "--quiet")
    assert outcome.err.startswith('warning: model "far": its delta is ')
    assert outcome.err.count("\n") == 1
    assert "far" in str(json.loads((world.out / "deltafl.json").read_text())["warnings"])


def test_no_common_float_tensor_is_an_error(tmp_path: Path) -> None:
    base = save(tmp_path / "base", {"steps": torch.tensor([1])})
    model = save(tmp_path / "m", {"steps": torch.tensor([2])})
    problem = refusal(tmp_path, "merge", "--base", base, "--models", model, "--out", tmp_path / "o")
    assert problem == "base and models have no float tensor in common; is this the right base?"


@pytest.mark.parametrize("method", ["fednova", "dare --drop-rate 0.5 --inner fednova"])
def test_fednova_without_steps_names_every_model_and_the_option(world: World, method: str) -> None:
    problems = refused(world.root, *world.args, "--method", *method.split(), "--dry-run")
    assert [p.split(":")[1] for p in problems] == [' model "m0"', ' model "m1"']
    assert all("--num-steps" in p for p in problems)


def test_every_problem_of_every_model_is_reported_at_once(tmp_path: Path) -> None:
    world = make_world(tmp_path, 5)
    changed("m0", "layer.0.bias", None)(world)
    changed("m1", "embed.weight", lambda t: torch.ones(11, 8))(world)
    changed("m1", "odd", torch.clone)(world)
    cut("m2", -4)(world)
    world.file("m3").unlink()
    (world.root / "m3/model.bin").write_bytes(b"PK\x03\x04 no zip")
    changed("m4", "layer.0.bias", torch.Tensor.int)(world)
    problems = refused(world.root, *world.args, "--method", "fedgm")
    for part in (
        'unknown method "fedgm"', 'model "m0": lacks', 'model "m1": tensor "embed.weight"',
        'model "m1": has "', str(world.file("m2")), "model.bin", 'model "m4"',
    ):  # fmt: skip
        assert sum(part in p for p in problems) == 1, (part, problems)
    assert len(problems) == 7


def test_a_device_that_is_not_there_is_an_error(world: World) -> None:
    if torch.cuda.is_available():
        pytest.skip("a CUDA device is there")
    assert "--device cuda" in refusal(world.root, *world.args, "--device", "cuda")


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_file_without_permission_is_an_error(world: World) -> None:
    world.file("m0").chmod(0)
    assert "cannot read or write" in refusal(world.root, *world.args)


def test_an_existing_output_is_refused_and_left_as_it_is(world: World) -> None:
    succeed(*world.args)
    problem = refusal(world.root, *world.args, "--server-lr", 2)
    assert problem == f'"{world.out}" exists; choose another --out, or replace it with --overwrite'


def test_overwrite_leaves_nothing_of_the_old_output(world: World) -> None:
    succeed(*world.args, "--max-shard-size", "200KB")
    (world.out / "notes.txt").write_text("old")
    assert len(list(world.out.glob("*.safetensors"))) > 1
    succeed(*world.args, "--overwrite")
    assert sorted(f.name for f in world.out.iterdir()) == [
        "config.json",
        "deltafl.json",
        "model.safetensors",
    ]
    assert sorted(p.name for p in world.root.iterdir()) == ["base", "m0", "m1", "out"]


@pytest.mark.parametrize("files", [["thesis.tex"], ["config.json", "main.py"]])
def test_overwrite_never_deletes_a_folder_that_is_not_a_model(
    world: World, files: list[str]
) -> None:
    world.out.mkdir()
    for name in files:
        (world.out / name).write_text("precious")
    assert "does not look like a model" in refusal(world.root, *world.args, "--overwrite")


@pytest.mark.parametrize("name", ["base", "m0", "m1", ".", "m0/../m1", "link"])
def test_an_output_that_is_an_input_is_refused(world: World, name: str) -> None:
    (world.root / "link").symlink_to("m1")
    problem = refusal(world.root, *world.args, "--out", world.root / name, "--overwrite")
    assert "is, or holds, the input" in problem or "does not look like a model" in problem
