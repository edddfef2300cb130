"""The laws of merging from disk: the same bits as in memory, however the files lie; memory bounded by the block."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from checkpoint_files import CONFIG, World, load, make_world, save, succeed, toy, tuned
from deltafl.algebra.aggregate import step
from deltafl.algebra.deltas import Update
from deltafl.merge.plan import plan_merge
from deltafl.merge.recipe import MergeRecipe
from deltafl.merge.run import run_merge
from deltafl.progress import Progress
from deltafl.rules.rule import Source, build_rule, load_rules

STEPS = (10, 20, 40)
EXAMPLES = (5, 5, 7)
PARAMS = {
    "cclip": {"rho": 0.5, "unit": "quantile"}, "dare": {"drop_rate": 0.5, "inner": "ties", "seed": 3},
    "fedgma": {"rho": 0.6}, "ties": {"density": 0.3},
}  # fmt: skip


def options(method: str) -> list[str]:
    given = [("method", method), *PARAMS.get(method, {}).items()]
    return [f"--{k.replace('_', '-')}={v}" for k, v in given]


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def world(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> World:
    """A base and three fine-tunes, whose training.json tell steps and examples."""
    world = make_world(tmp_path_factory.mktemp("world"), 3, request.param)
    for i in range(3):
        told = {"num_steps": STEPS[i], "num_examples": EXAMPLES[i]}
        (world.root / f"m{i}/training.json").write_text(json.dumps(told))
    return world


def in_memory(
    world: World, method: str, server_lr: float, weights: tuple[float, ...]
) -> dict[str, Tensor]:
    """One server step on dicts, through the library."""
    floats = [n for n, t in world.base.items() if t.is_floating_point()]
    updates = [
        Update(
            {n: m[n].float() - world.base[n].float() for n in floats},
            Source(f"m{i}", EXAMPLES[i], STEPS[i]),
        )
        for i, m in enumerate(world.models)
    ]
    return dict(
        step(world.base, updates, build_rule(method, PARAMS.get(method, {})), server_lr, weights)
    )


def assert_same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert set(a) == set(b)
    for name in a:
        assert a[name].dtype == b[name].dtype
        assert torch.equal(a[name], b[name]), name


@pytest.mark.parametrize("method", list(load_rules()))
def test_the_command_line_computes_what_the_library_computes_in_memory(
    world: World, tmp_path: Path, method: str
) -> None:
    scale = ("--server-lr", 0.7, "--weights", 1, 2, -0.5)
    succeed(*world.args, *options(method), *scale, "--out", tmp_path / "out", "--threads", 2)
    assert_same_bits(load(tmp_path / "out"), in_memory(world, method, 0.7, (1, 2, -0.5)))


@pytest.mark.parametrize("method", ["task_arithmetic", "median", "cclip", "ties", "dare"])
def test_threads_shards_and_order_in_the_files_change_no_bit(
    world: World, tmp_path: Path, method: str
) -> None:
    succeed(*world.args, *options(method), "--out", tmp_path / "one", "--threads", 1)
    save(tmp_path / "base", world.base, shards=3)
    backwards = []
    for i, model in enumerate(world.models):
        for name in reversed(model):
            folder = tmp_path / f"m{i}"
            folder.mkdir(exist_ok=True)
            # one shard for each tensor, in another order
            save(folder / name, {name: model[name]}, config=None)
        files = {name: f"{name.replace('.', '_')}.safetensors" for name in reversed(model)}
        for name, file in files.items():
            (folder / name / "model.safetensors").rename(folder / file)
            (folder / name).rmdir()
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
        backwards.append(folder)
    succeed("merge", "--base", tmp_path / "base", "--models", *backwards, *options(method), "--out", tmp_path / "many",
            "--threads", 4, "--max-shard-size", "150KB")  # fmt: skip
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 1
    assert_same_bits(load(tmp_path / "one"), load(tmp_path / "many"))


def test_exact_is_the_correctly_rounded_float64_result(tmp_path: Path) -> None:
    from checkpoint_files import mean_step

    world = make_world(tmp_path, 3, torch.bfloat16)
    succeed(*world.args, "--scaling-coef", 0.3, "--exact")
    wanted = mean_step(world.base, world.models, 0.3)
    merged = load(world.out)
    off = total = 0
    for name, values in wanted.items():
        up = torch.tensor(values)
        # nearest bfloat16 of a float64: of the two neighbours of the float32 one, the closer
        near = up.float().bfloat16()
        far = merged[name].double()
        off += int(((far - up).abs() > (near.double() - up).abs()).sum())
        total += up.numel()
    assert total > 80_000
    assert off == 0


def test_two_runs_write_the_same_bytes(world: World, tmp_path: Path) -> None:
    for name in ("a", "b"):
        succeed(*world.args, *options("dare"), "--out", tmp_path / name)
    for file in ("model.safetensors", "config.json", "deltafl.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_no_input_is_changed(world: World, tmp_path: Path) -> None:
    from checkpoint_files import files_in

    before = files_in(world.root)
    succeed(*world.args, "--out", tmp_path / "out")
    assert files_in(world.root) == before


def test_progress_reaches_its_total(world: World, tmp_path: Path) -> None:
    for method in ("task_arithmetic", "cclip", "ties"):
        models = [str(world.root / f"m{i}") for i in range(3)]
        base = str(world.root / "base")
        params = PARAMS.get(method, {})
        plan = plan_merge(MergeRecipe.of(base=base, models=models, method=method, **params))
        told: list[Progress] = []
        run_merge(plan, tmp_path / method, on_progress=told.append)
        assert len(told) >= plan.passes
        for name in {progress.name for progress in told}:
            seen = [(progress.done, progress.total) for progress in told if progress.name == name]
            assert (seen[-1][0], len({total for _, total in seen})) == (seen[-1][1], 1)


def test_patterns_of_weights_choose_per_tensor(world: World, tmp_path: Path) -> None:
    held = {
        "base": str(world.root / "base"), "models": [str(world.root / f"m{i}") for i in range(3)],
        "weight_patterns": {"embed.*": [1, 0, 0], "layer.*": [0, 0, 1]}, "weights": [0, 1, 0], "exact": True,
    }  # fmt: skip
    run_merge(plan_merge(MergeRecipe.of(**held)), tmp_path / "out")
    merged = load(tmp_path / "out")
    for name, i in (
        ("embed.weight", 0),
        ("norm.weight", 1),
        ("layer.0.bias", 2),
        ("layer.0.weight", 2),
    ):
        assert torch.equal(merged[name], world.models[i][name])


def test_the_preflight_needs_no_torch(world: World) -> None:
    code = "import sys; from deltafl.cli import main\ntry: main()\nexcept SystemExit as e: assert not e.code\n" \
        "assert 'torch' not in sys.modules; assert 'transformers' not in sys.modules"  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", code, *world.args, "--dry-run"], capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")


PEAKS = """
import shlex, sys, threading, time
import deltafl.algebra.aggregate, deltafl.checkpoints.checkpoint, deltafl.merge.run, deltafl.checkpoints.writing
from deltafl.cli import main

def anonymous():
    with open("/proc/self/status") as status:
        return 1024 * next(int(line.split()[1]) for line in status if line.startswith("RssAnon"))

def watch():
    global peak
    while not done:
        peak = max(peak, anonymous())
        time.sleep(0.002)

for line in sys.stdin:
    peak, done = 0, False
    before, watcher = anonymous(), threading.Thread(target=watch)
    watcher.start()
    try:
        main(shlex.split(line))
    except SystemExit as leave:
        assert not leave.code
    done = True
    watcher.join()
    print(before, peak)
"""
"""For each command line: anonymous memory before it, and its peak, in bytes."""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="the system has no /proc")
def test_memory_is_bounded_by_the_block_and_not_by_the_model(tmp_path: Path) -> None:
    lines = []
    for size in (64, 192):
        draw = torch.Generator().manual_seed(size)
        weight = torch.rand(size * 256, 1024, generator=draw)
        for name in ("base", "m0", "m1"):
            moved = weight + 0.01 * torch.rand(weight.shape, generator=draw)
            save(tmp_path / str(size) / name, {"big.weight": moved}, config=CONFIG)
    for method in ("task_arithmetic", "ties"):
        for size in (64, 192):
            base, m0, m1 = (str(tmp_path / str(size) / name) for name in ("base", "m0", "m1"))
            out = str(tmp_path / f"{method}-{size}")
            lines.append(
                f"merge --base {base} --models {m0} {m1} --out {out} --method {method} --quiet --threads 2\n"
            )
    done = subprocess.run(
        [sys.executable, "-c", PEAKS], input="".join(lines), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    told = [[int(x) for x in line.split()] for line in done.stdout.splitlines()]
    for (before, small), (_, large) in (told[:2], told[2:]):
        assert 0 < small - before < 256 * 2**20
        assert large - small < 32 * 2**20  # a copy of one model would be 128 MB more


def test_tied_tensors_are_compared_by_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from deltafl.checkpoints.checkpoint import Checkpoint

    name = "model.embed_tokens.weight"
    base = {name: toy()["layer.0.weight"]}
    model = tuned(base, 1)
    save(tmp_path / "base", base)
    save(tmp_path / "m", model | {"lm_head.weight": model[name].clone()})

    def whole(self: Checkpoint, key: str) -> Tensor:
        raise AssertionError(f"{key} was read whole")

    monkeypatch.setattr(Checkpoint, "__getitem__", whole)
    succeed(
        "merge", "--base", tmp_path / "base", "--models", tmp_path / "m", "--out", tmp_path / "out"
    )
