"""`deltafl merge` from the outside: what it refuses, and how; what it does otherwise."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import save_file

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
from deltafl.cli.options import as_bytes


@pytest.fixture
def world(tmp_path: Path) -> World:
    return make_world(tmp_path)


def rewrite(world: World, name: str, change) -> None:
    """Change one model's tensors on disk: `change(tensors)`."""
    held = load(world.root / name)
    change(held)
    save_file(held, world.file(name))


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
    assert (world.root / "sum/model.safetensors").read_bytes() == (
        world.root / "mean/model.safetensors"
    ).read_bytes()
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
    succeed(
        "merge",
        "--base",
        base,
        "--models",
        m0,
        m1,
        "--out",
        world.root / "a",
        "--weights",
        -0.5,
        "1e0",
    )
    succeed(
        "merge",
        "--base",
        base,
        "--models",
        m0,
        "--models",
        m1,
        "--out",
        world.root / "b",
        "--weights=-0.5",
        1,
    )
    assert (world.root / "a/model.safetensors").read_bytes() == (
        world.root / "b/model.safetensors"
    ).read_bytes()


def test_a_negative_weight_subtracts_a_model(world: World) -> None:
    succeed(*world.args, "--weights", -1, 1, "--scaling-coef", 0.5)
    merged = load(world.out)
    for name, theta in world.base.items():
        if theta.is_floating_point():
            want = theta.double() + 0.5 * (
                world.models[1][name].double() - world.models[0][name].double()
            )
            torch.testing.assert_close(merged[name].double(), want, rtol=2e-7, atol=2e-7)


def test_a_negative_scale_is_a_number_and_not_an_option(world: World) -> None:
    succeed(*world.args, "--scaling-coef", "-0.3")
    wanted = mean_step(world.base, world.models, -0.3)
    np.testing.assert_allclose(
        load(world.out)["embed.weight"].numpy(), wanted["embed.weight"], rtol=1e-6, atol=1e-6
    )


def test_a_recipe_gives_the_same_bits_as_the_flags(world: World) -> None:
    succeed(
        *world.args,
        "--method",
        "fedgma",
        "--rho",
        0.6,
        "--scaling-coef",
        0.3,
        "--weights",
        1,
        2,
        "--threads",
        1,
    )
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
    import hashlib

    for said, name in (
        (record["base"], "base"),
        (record["models"][0], "m0"),
        (record["models"][1], "m1"),
    ):
        assert said["sha256"] == {
            "model.safetensors": hashlib.sha256(world.file(name).read_bytes()).hexdigest()
        }
    assert record["models"][0]["header_sha256"] == record["base"]["header_sha256"]
    assert record["models"][0]["fingerprint"] != record["base"]["fingerprint"]
    assert record["versions"]["torch"] == torch.__version__


def test_without_hash_no_file_is_read_whole_for_the_record(world: World) -> None:
    succeed(*world.args)
    record = json.loads((world.out / "deltafl.json").read_text())
    assert record["base"]["sha256"] is None


def test_steps_and_examples_come_from_training_json_unless_given(tmp_path: Path) -> None:
    base = toy()
    save(tmp_path / "base", base)
    for i in range(2):
        save(
            tmp_path / f"m{i}",
            tuned(base, i),
            training={"num_steps": 100 * (i + 1), "num_examples": 7},
        )
    args = (
        "merge",
        "--base",
        tmp_path / "base",
        "--models",
        tmp_path / "m0",
        tmp_path / "m1",
        "--method",
        "fednova",
    )
    succeed(*args, "--out", tmp_path / "out")
    # FedNova, equal p: c_i = mean(tau) / (n tau_i), methods.md section 2
    assert json.loads((tmp_path / "out/deltafl.json").read_text())["coefficients"] == pytest.approx(
        [0.75, 0.375]
    )
    succeed(*args, "--out", tmp_path / "given", "--num-steps", 10, 10)
    assert json.loads((tmp_path / "given/deltafl.json").read_text())[
        "coefficients"
    ] == pytest.approx([0.5, 0.5])


def test_quiet_says_nothing(world: World) -> None:
    outcome = succeed(*world.args, "--quiet")
    assert (outcome.out, outcome.err) == ("", "")


def test_no_progress_bar_where_stderr_is_not_a_terminal(world: World) -> None:
    assert succeed(*world.args).err == ""


def test_rules_lists_every_method_with_its_parameters() -> None:
    from deltafl.rules.rule import load_rules, parameters

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


def test_a_missing_tensor_is_named(world: World) -> None:
    rewrite(world, "m1", lambda held: held.pop("layer.0.bias"))
    problem = refusal(world.root, *world.args)
    assert problem.startswith('model "m1": lacks 1 tensor of the base: "layer.0.bias"')
    assert "--exclude" in problem
    succeed(*world.args, "--exclude", "layer.0.bias")


def test_an_extra_tensor_is_named(world: World) -> None:
    rewrite(world, "m0", lambda held: held.update({"layer.1.weight": torch.ones(2)}))
    problem = refusal(world.root, *world.args)
    assert problem.startswith('model "m0": has 1 tensor that the base lacks: "layer.1.weight"')


def test_another_shape_is_named_with_both_shapes(world: World) -> None:
    rewrite(world, "m0", lambda held: held.update({"layer.0.bias": torch.ones(7)}))
    problem = refusal(world.root, *world.args)
    assert problem.startswith('model "m0": tensor "layer.0.bias" is (7,), the base has (8,)')


def test_another_vocabulary_is_an_error_and_never_truncated(world: World) -> None:
    rewrite(world, "m1", lambda held: held.update({"embed.weight": torch.ones(11, 8)}))
    problem = refusal(world.root, *world.args)
    assert (
        problem
        == 'model "m1": tensor "embed.weight" is (11, 8), the base has (9, 8); another vocabulary?'
    )


@pytest.mark.parametrize("name", ["base", "m1"])
@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_a_truncated_file_is_named(world: World, name: str, keep: int) -> None:
    raw = world.file(name).read_bytes()
    world.file(name).write_bytes(raw[:keep])
    problem = refusal(world.root, *world.args)
    assert problem.startswith(f'"{world.file(name)}": ')
    assert "truncated" in problem
    assert "download it again" in problem


def test_bytes_after_the_last_tensor_are_an_error(world: World) -> None:
    world.file("m0").write_bytes(world.file("m0").read_bytes() + b"x")
    assert "truncated or corrupt" in refusal(world.root, *world.args)


CORRUPT = {
    "not json": lambda raw: raw[:8] + b"?" + raw[9:],
    "not text": lambda raw: raw[:9] + b"\xff\xfe" + raw[11:],
    "endless": lambda raw: b"\xff" * 8 + raw[8:],
    "deep": lambda raw: (200_000).to_bytes(8, "little") + b"[" * 200_000,
    "a list": lambda raw: (2).to_bytes(8, "little") + b"[]",
    "git lfs pointer": lambda raw: (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    ),
}


@pytest.mark.parametrize("damage", list(CORRUPT.values()), ids=list(CORRUPT))
def test_a_corrupt_header_is_an_error(world: World, damage) -> None:
    world.file("m0").write_bytes(damage(world.file("m0").read_bytes()))
    problem = refusal(world.root, *world.args)
    assert problem.startswith(f'"{world.file("m0")}": ')
    assert "corrupt" in problem or "truncated or not a safetensors file" in problem


HEADERS = {
    "overlap": lambda h: h["embed.weight"].update(data_offsets=h["layer.0.bias"]["data_offsets"]),
    "another shape": lambda h: h["embed.weight"].update(shape=[8, 8]),
    "negative shape": lambda h: h["embed.weight"].update(shape=[-9, -8]),
    "no shape": lambda h: h["embed.weight"].pop("shape"),
    "no tensor": lambda h: h.update(odd=5),
    "a hole": lambda h: h.pop("embed.weight"),
    "backwards": lambda h: h["embed.weight"].update(data_offsets=[288, 0]),
}


@pytest.mark.parametrize("change", list(HEADERS.values()), ids=list(HEADERS))
def test_a_header_that_does_not_describe_its_bytes_is_an_error(world: World, change) -> None:
    patch_header(world.file("m0"), change)
    problem = refusal(world.root, *world.args)
    assert problem.startswith(f'"{world.file("m0")}": ')
    assert "corrupt" in problem


def test_a_dtype_that_is_not_known_is_named(world: World) -> None:
    patch_header(world.file("m0"), lambda h: h["embed.weight"].update(dtype="F4"))
    assert 'tensor "embed.weight" has dtype F4, which is not supported' in refusal(
        world.root, *world.args
    )


METHODS = {
    "task_arithmetic": [], "median": [], "fedgma": ["--rho", 0.5], "cclip": ["--rho", 1], "ties": [],
    "dare": ["--drop-rate", 0.5], "geometric_median": [], "krum": [],
}  # fmt: skip


@pytest.mark.parametrize("method", list(METHODS))
@pytest.mark.parametrize(
    "value", [float("nan"), float("inf"), float("-inf")], ids=["nan", "inf", "-inf"]
)
def test_nan_and_inf_are_errors_that_name_tensor_and_model(
    tmp_path: Path, method: str, value: float
) -> None:
    world = make_world(tmp_path, 3)
    name = "layer.0.weight"

    def damage(held) -> None:
        held[name][7, 5:2000] = value  # long enough that random dropping cannot drop all of it

    rewrite(world, "m1", damage)
    problem = refusal(world.root, *world.args, "--method", method, *METHODS[method])
    assert problem.startswith(
        f'model "m1": tensor "{name}" differs from the base by NaN or Inf (element '
    )
    assert "--exclude" in problem
    succeed(*world.args, "--method", method, *METHODS[method], "--exclude", name)


def test_a_misspelt_option_is_an_error_that_offers_the_right_one(world: World) -> None:
    problem = refusal(world.root, *world.args, "--scaling-coeff", 0.3)
    assert "--scaling-coeff" in problem
    assert "--scaling-coef" in problem.replace("--scaling-coeff", "")


def test_a_misspelt_command_is_an_error_that_offers_the_right_one(tmp_path: Path) -> None:
    assert 'did you mean "merge"?' in refusal(tmp_path, "merg")


def test_a_misspelt_method_is_an_error_that_offers_the_right_one(world: World) -> None:
    assert (
        refusal(world.root, *world.args, "--method", "fedgm")
        == 'unknown method "fedgm"; did you mean "fedgma"?'
    )


def test_a_parameter_of_another_rule_is_an_error(world: World) -> None:
    problem = refusal(world.root, *world.args, "--method", "median", "--rho", 0.5)
    assert problem.startswith('method median has no parameter "rho"')
    problem = refusal(world.root, *world.args, "--rho", 0.5)
    assert problem == 'method task_arithmetic has no parameter "rho"; there is none'


def test_a_parameter_that_is_needed_is_named_as_its_option(world: World) -> None:
    assert refusal(world.root, *world.args, "--method", "fedgma") == "method fedgma needs --rho"


def test_a_parameter_out_of_range_is_an_error(world: World) -> None:
    assert "rho is 2" in refusal(world.root, *world.args, "--method", "fedgma", "--rho", 2)


def recipe_of(world: World, **changes: object) -> Path:
    held = {
        "base": str(world.root / "base"),
        "models": [str(world.root / "m0"), str(world.root / "m1")],
    }
    file = world.root / "recipe.yaml"
    file.write_text(yaml.safe_dump(held | {"out": str(world.out)} | changes))
    return file


def test_a_misspelt_recipe_key_is_an_error_that_offers_the_right_one(world: World) -> None:
    problem = refusal(world.root, "merge", recipe_of(world, scaling_coeff=0.3))
    assert problem == 'unknown key "scaling_coeff"; did you mean "scaling_coef"?'


def test_a_misspelt_key_of_a_model_is_an_error_that_offers_the_right_one(world: World) -> None:
    models = [str(world.root / "m0"), {"path": str(world.root / "m1"), "wieght": 2}]
    problem = refusal(world.root, "merge", recipe_of(world, models=models))
    assert problem == 'unknown key "models.1.wieght"; did you mean "weight"?'


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
    method = {"method": "fedgma", "rho": 0.5} | {key: value} if key == "rho" else {key: value}
    problem = refusal(world.root, "merge", recipe_of(world, **method))
    assert problem.startswith((f"{key}: ", f"{key}.0: "))


def test_every_mistake_of_a_recipe_is_listed_at_once(world: World) -> None:
    file = recipe_of(world, server_lr="fast", scaling_coef="much", threads=-2)
    assert [p.split(":")[0] for p in refused(world.root, "merge", file)] == [
        "threads",
        "server_lr",
        "scaling_coef",
    ]


@pytest.mark.parametrize("text", ["a: [", "- 1\n- 2\n", "", "just words"])
def test_a_recipe_that_is_no_mapping_is_an_error(world: World, text: str) -> None:
    (world.root / "r.yaml").write_text(text)
    assert refusal(world.root, "merge", world.root / "r.yaml").startswith(
        f'"{world.root / "r.yaml"}": '
    )


def test_a_recipe_that_is_not_there_is_an_error(world: World) -> None:
    assert "No such file" in refusal(world.root, "merge", world.root / "none.yaml")


def test_a_base_and_models_are_needed(world: World) -> None:
    assert "--base" in refusal(
        world.root, "merge", "--models", world.root / "m0", "--out", world.out
    )
    assert "--models" in refusal(
        world.root, "merge", "--base", world.root / "base", "--out", world.out
    )


def test_an_output_is_needed(world: World) -> None:
    assert "--out" in refusal(world.root, *world.args[:-2])


@pytest.mark.parametrize(
    "name", ["../m1/model.safetensors", "/etc/passwd", "..", "sub/x.safetensors"]
)
def test_an_index_that_points_outside_its_folder_is_not_followed(world: World, name: str) -> None:
    folder = save(world.root / "odd", world.models[0], shards=2)
    index = folder / "model.safetensors.index.json"
    held = json.loads(index.read_text())
    held["weight_map"]["layer.0.bias"] = name
    index.write_text(json.dumps(held))
    problem = refusal(world.root, *world.args, "--models", folder)
    assert (
        problem == f'"{index}": points outside its folder ("{name}"); do not trust this checkpoint'
    )


def test_a_missing_shard_is_named(world: World) -> None:
    folder = save(world.root / "odd", world.models[0], shards=2)
    (folder / "model-00002-of-00002.safetensors").unlink()
    assert 'the shard "model-00002-of-00002.safetensors" is missing' in refusal(
        world.root, *world.args, "--models", folder
    )


def test_an_index_that_disagrees_with_its_shards_is_an_error(world: World) -> None:
    folder = save(world.root / "odd", world.models[0], shards=2)
    index = folder / "model.safetensors.index.json"
    held = json.loads(index.read_text())
    held["weight_map"]["embed.weight"] = "model-00002-of-00002.safetensors"
    index.write_text(json.dumps(held))
    problem = refusal(world.root, *world.args, "--models", folder)
    assert 'disagree about "embed.weight"' in problem


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": 5}', '{"weight_map": {"a": 5}}'])
def test_a_broken_index_is_an_error(world: World, text: str) -> None:
    folder = save(world.root / "odd", world.models[0], shards=2)
    index = folder / "model.safetensors.index.json"
    index.write_text(text)
    problem = refusal(world.root, *world.args, "--models", folder)
    assert problem.startswith(f'"{index}": ')
    assert "not an index" in problem


def test_a_tensor_in_two_shards_is_an_error(world: World) -> None:
    folder = save(world.root / "odd", world.models[0], shards=2)
    held = load(folder)
    save_file({n: held[n] for n in ("layer.0.weight", "embed.weight", "norm.weight", "steps")},
              folder / "model-00002-of-00002.safetensors")  # fmt: skip
    assert "is in two shards" in refusal(world.root, *world.args, "--models", folder)


def test_a_folder_without_weights_is_an_error(world: World) -> None:
    (world.root / "empty").mkdir()
    assert "no weights" in refusal(world.root, *world.args, "--base", world.root / "empty")


def trained_on(world: World, name: str) -> dict[str, object]:
    return {"base": {"id": "the/other", "fingerprint": fingerprint(read_layout(world.root / name))}}


def test_a_fine_tune_of_another_base_is_refused_unless_insisted(world: World) -> None:
    (world.root / "m1/training.json").write_text(json.dumps(trained_on(world, "m0")))
    problem = refusal(world.root, *world.args)
    assert problem.startswith('model "m1": was fine-tuned from another base ("the/other")')
    assert "--allow-other-base" in problem
    outcome = succeed(*world.args, "--allow-other-base")
    assert "another base" in outcome.out


def test_a_fine_tune_of_this_base_passes(world: World) -> None:
    (world.root / "m1/training.json").write_text(json.dumps(trained_on(world, "base")))
    succeed(*world.args)


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '{"num_steps": "many"}',
        '{"num_steps": true}',
        '{"num_steps": 1.5}',
        '{"base": "x"}',
        '{"lr": []}',
    ],
)
def test_a_training_json_that_cannot_be_right_is_an_error(world: World, text: str) -> None:
    (world.root / "m1/training.json").write_text(text)
    assert refusal(world.root, *world.args).startswith(f'"{world.root / "m1/training.json"}": ')


def test_a_delta_as_large_as_the_base_is_warned_of(world: World) -> None:
    save(world.root / "far", tuned(world.base, 5, scale=1.0))
    outcome = succeed(*world.args, "--models", world.root / "m0", world.root / "far", "--quiet")
    assert outcome.err.startswith('warning: model "far": its delta is ')
    assert outcome.err.count("\n") == 1
    assert "far" in str(json.loads((world.out / "deltafl.json").read_text())["warnings"])


def test_no_common_float_tensor_is_an_error(tmp_path: Path) -> None:
    save(tmp_path / "base", {"steps": torch.tensor([1])})
    save(tmp_path / "m", {"steps": torch.tensor([2])})
    problem = refusal(
        tmp_path,
        "merge",
        "--base",
        tmp_path / "base",
        "--models",
        tmp_path / "m",
        "--out",
        tmp_path / "out",
    )
    assert problem == "base and models have no float tensor in common; is this the right base?"


def test_two_ways_to_give_the_scale_are_an_error(world: World) -> None:
    problem = refusal(world.root, *world.args, "--server-lr", 1, "--scaling-coef", 0.3)
    assert "server_lr and scaling_coef" in problem


@pytest.mark.parametrize("value", ["nan", "inf"])
@pytest.mark.parametrize("option", ["--server-lr", "--scaling-coef"])
def test_a_scale_that_is_not_finite_is_an_error(world: World, option: str, value: str) -> None:
    key = option.removeprefix("--").replace("-", "_")
    assert refusal(world.root, *world.args, option, value).startswith(f"{key}: must be a finite")


@pytest.mark.parametrize("option", ["--weights", "--num-steps", "--num-examples"])
def test_a_wrong_number_of_per_model_values_is_an_error(world: World, option: str) -> None:
    problem = refusal(world.root, *world.args, option, 1, 2, 3)
    assert problem.endswith("3 numbers for 2 models")


@pytest.mark.parametrize("values", [("nan", 1), ("inf", 1), (0, 0)])
def test_weights_that_mean_nothing_are_an_error(world: World, values: tuple[object, ...]) -> None:
    assert refusal(world.root, *world.args, "--weights", *values, "--dry-run").startswith("weights")


@pytest.mark.parametrize(
    "method",
    [["fednova"], ["dare", "--drop-rate", "0.5", "--inner", "fednova"]],
    ids=["plain", "dare"],
)
def test_fednova_without_steps_names_every_model_and_the_option(
    world: World, method: list[str]
) -> None:
    problems = refused(world.root, *world.args, "--method", *method, "--dry-run")
    assert [p.split(":")[1] for p in problems] == [' model "m0"', ' model "m1"']
    assert all("--num-steps" in p for p in problems)


def test_fednova_with_no_steps_at_all_is_an_error(world: World) -> None:
    assert "number of local steps is 0" in refusal(
        world.root, *world.args, "--method", "fednova", "--num-steps", 0, 5
    )


def test_a_quantised_model_is_refused(world: World) -> None:
    rewrite(
        world,
        "m1",
        lambda held: held.update({"embed.weight": held["embed.weight"].to(torch.float8_e4m3fn)}),
    )
    problem = refusal(world.root, *world.args)
    assert problem.startswith('model "m1": 1 tensor is F8_E4M3, in the base F32: "embed.weight"')


def test_a_quantised_base_is_refused(world: World) -> None:
    for name in ("base", "m0", "m1"):
        rewrite(
            world,
            name,
            lambda held: held.update(
                {"embed.weight": held["embed.weight"].to(torch.float8_e4m3fn)}
            ),
        )
    problem = refusal(world.root, *world.args)
    assert problem.startswith('the base: 1 tensor is quantised (F8_E4M3): "embed.weight"; ')
    succeed(*world.args, "--exclude", "embed.weight")


def test_an_integer_where_the_base_has_a_float_is_an_error(world: World) -> None:
    rewrite(
        world, "m0", lambda held: held.update({"layer.0.bias": torch.ones(8, dtype=torch.int64)})
    )
    assert refusal(world.root, *world.args).startswith(
        'model "m0": 1 tensor is I64, in the base F32: "layer.0.bias"'
    )


def test_every_problem_of_every_model_is_reported_at_once(tmp_path: Path) -> None:
    world = make_world(tmp_path, 5)
    rewrite(world, "m0", lambda held: held.pop("layer.0.bias"))
    rewrite(
        world,
        "m1",
        lambda held: held.update({"embed.weight": torch.ones(11, 8), "odd": torch.ones(1)}),
    )
    world.file("m2").write_bytes(world.file("m2").read_bytes()[:-4])
    world.file("m3").unlink()
    (world.root / "m3/model.bin").write_bytes(b"PK\x03\x04 no zip")
    rewrite(
        world, "m4", lambda held: held.update({"layer.0.bias": torch.ones(8, dtype=torch.int32)})
    )
    problems = refused(world.root, *world.args, "--method", "fedgm")
    for part in (
        'unknown method "fedgm"', 'model "m0": lacks', 'model "m1": tensor "embed.weight"',
        'model "m1": has 1 tensor', str(world.file("m2")), "model.bin", 'model "m4"',
    ):  # fmt: skip
        assert sum(part in p for p in problems) == 1, (part, problems)
    assert len(problems) == 7


def test_an_unknown_pattern_is_an_error(world: World) -> None:
    assert 'pattern "layr.*" matches no tensor' in refusal(
        world.root, *world.args, "--exclude", "layr.*"
    )


def test_an_unknown_scope_is_an_error(world: World) -> None:
    assert '--scope "visual" matches no tensor' in refusal(
        world.root, *world.args, "--scope", "visual"
    )


def test_a_path_that_is_not_there_is_an_error(world: World) -> None:
    missing = world.root / "none"
    assert refusal(world.root, *world.args, "--base", missing).startswith(
        f'"{missing}": no such file or folder'
    )


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
