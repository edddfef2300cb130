"""The laws of merging from disk: the same bits as in memory, however the files lie; memory bounded by the block."""

import contextlib
import errno
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from checkpoint_files import (
    World,
    cli,
    files_in,
    load,
    make_world,
    mean_step,
    python,
    refusal,
    save,
    succeed,
    toy,
    tuned,
)
from deltafl.algebra import streaming
from deltafl.algebra.aggregate import step
from deltafl.algebra.deltas import Update
from deltafl.checkpoints.checkpoint import Checkpoint
from deltafl.merge.plan import plan_merge
from deltafl.merge.recipe import MergeRecipe
from deltafl.merge.run import run_merge
from deltafl.pool import Pool
from deltafl.progress import Progress
from deltafl.rules.building import build_rule, delta_rules
from deltafl.rules.rule import Source

STEPS = (10, 20, 40)
EXAMPLES = (5, 5, 7)
PARAMS = {
    "cclip": {"rho": 0.5, "unit": "quantile"}, "dare": {"drop_rate": 0.5, "inner": "ties", "seed": 3},
    "fedgma": {"rho": 0.6}, "ties": {"density": 0.3}, "della": {"density": 0.5}, "breadcrumbs": {"density": 0.5},
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
    assert {n: t.dtype for n, t in a.items()} == {n: t.dtype for n, t in b.items()}
    assert [n for n in a if not torch.equal(a[n], b[n])] == []


@pytest.mark.parametrize("method", list(delta_rules()))
def test_processes_write_what_the_library_computes_in_memory(world, tmp_path, method, forks):
    weights = (1, 2, 0.5 if method == "karcher" else -0.5)
    scale = ("--server-lr", 0.7, "--weights", *weights)
    succeed(*world.args, *options(method), *scale, "--out", tmp_path / "out", "--threads", 3)
    assert len(forks) >= (2 if method in ("ties", "dare", "cclip", "krum") else 1)
    assert_same_bits(load(tmp_path / "out"), in_memory(world, method, 0.7, weights))


@pytest.mark.parametrize("method", ["task_arithmetic", "median", "cclip", "ties", "dare"])
def test_threads_shards_and_order_in_the_files_change_no_bit(world, tmp_path, method):
    succeed(*world.args, *options(method), "--out", tmp_path / "one", "--threads", 1)
    save(tmp_path / "base", world.base, shards=3)
    backwards = [
        save(tmp_path / f"m{i}", dict(reversed(model.items())), shards=len(model))
        for i, model in enumerate(world.models)
    ]
    succeed("merge", "--base", tmp_path / "base", "--models", *backwards, *options(method), "--out", tmp_path / "many",
            "--threads", 4, "--max-shard-size", "150KB")  # fmt: skip
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 1
    assert_same_bits(load(tmp_path / "one"), load(tmp_path / "many"))


def test_exact_is_the_correctly_rounded_float64_result(tmp_path: Path) -> None:
    world = make_world(tmp_path, 3, torch.bfloat16)
    succeed(*world.args, "--scaling-coef", 0.3, "--exact")
    merged = load(world.out)
    for name, values in mean_step(world.base, world.models, 0.3).items():
        wanted = torch.tensor(values)
        # nearest bfloat16 of a float64: of the two neighbours of the float32 one, the closer
        near = wanted.float().bfloat16().double()
        assert ((merged[name].double() - wanted).abs() <= (near - wanted).abs()).all()


def test_progress_reaches_its_total(world: World, tmp_path: Path) -> None:
    base, *models = (str(world.root / name) for name in ("base", "m0", "m1", "m2"))
    for method in ("task_arithmetic", "cclip", "ties"):
        told: list[Progress] = []
        given = {"base": base, "models": models, "method": method, **PARAMS.get(method, {})}
        plan = plan_merge(MergeRecipe.of(**given))
        run_merge(plan, tmp_path / method, on_progress=told.append)
        assert len(told) >= plan.passes
        for name in {progress.name for progress in told}:
            seen = [(progress.done, progress.total) for progress in told if progress.name == name]
            assert (seen[-1][0], len({total for _, total in seen})) == (seen[-1][1], 1)


def test_the_preflight_needs_no_torch(world: World) -> None:
    code = "import sys; from deltafl.cli import main\ntry: main()\nexcept SystemExit as e: assert not e.code\n"
    code += "assert not {'torch', 'transformers'} & set(sys.modules)"
    done = python(code, *world.args, "--dry-run")
    assert (done.returncode, done.stderr) == (0, "")


PEAKS = """
import os, shlex, sys
import deltafl.merge.run
from deltafl.cli import main
for line in sys.stdin:
    if not (child := os.fork()):
        main(shlex.split(line))
    _, status, used = os.wait4(child, 0)
    assert not status
    print(1024 * used.ru_maxrss, flush=True)
"""
"""For each command line: bytes that it, or one of its worker processes, has held at most."""


@pytest.mark.skipif(sys.platform != "linux", reason="other systems count memory in other ways")
def test_memory_is_bounded_by_the_block_and_not_by_the_model(tmp_path: Path) -> None:
    lines = ["--version"]
    for size in (64, 192):
        draw = torch.Generator().manual_seed(size)
        weight = torch.rand(size * 256, 1024, generator=draw)
        for name in ("base", "m0", "m1"):
            moved = weight + 0.01 * torch.rand(weight.shape, generator=draw)
            save(tmp_path / str(size) / name, {"big.weight": moved})
    for method in ("task_arithmetic", "ties"):
        for size in (64, 192):
            root = tmp_path / str(size)
            lines.append(
                f"merge --base {root}/base --models {root}/m0 {root}/m1 --out {root}/{method} "
                f"--method {method} --quiet --threads 2"
            )
    done = python(PEAKS, input="\n".join(lines))
    assert done.returncode == 0, done.stderr
    _, before, *peaks = done.stdout.splitlines()  # the first line is the version
    for small, large in zip(peaks[::2], peaks[1::2], strict=True):
        assert 0 < int(small) - int(before) < 256 * 2**20
        assert int(large) - int(small) < 32 * 2**20  # a copy of one model would be 128 MB more


def test_tied_tensors_are_compared_by_blocks(tmp_path, monkeypatch):
    name = "model.embed_tokens.weight"
    base = {name: toy()["layer.0.weight"]}
    model = tuned(base, 1)
    one = save(tmp_path / "base", base)
    two = save(tmp_path / "m", model | {"lm_head.weight": model[name].clone()})
    monkeypatch.setattr(Checkpoint, "__getitem__", lambda *_: pytest.fail("a tensor read whole"))
    succeed("merge", "--base", one, "--models", two, "--out", tmp_path / "out")


# In forked processes, which leave nothing behind


@pytest.fixture
def forks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Every block is a unit of work; how many workers each pass forked."""
    asked = []

    def counted(work, workers, **options):
        asked.extend([workers] * (workers > 1))
        return Pool(work, workers, **options)

    monkeypatch.setattr(streaming, "CHUNK", 1)
    monkeypatch.setattr(streaming, "can_fork", lambda: True)
    monkeypatch.setattr(streaming, "Pool", counted)
    return asked


@pytest.fixture
def sabotage(monkeypatch: pytest.MonkeyPatch, forks: list[int]) -> Callable[..., None]:
    """Let every worker do something before it writes."""
    parent, pwrite = os.getpid(), os.pwrite

    def patch(deed):
        def spoilt(*arguments):
            if os.getpid() != parent:
                deed()
            return pwrite(*arguments)

        monkeypatch.setattr(os, "pwrite", spoilt)

    return patch


def test_inspect_says_the_same(tmp_path: Path, forks: list[int]) -> None:
    world, told = make_world(tmp_path, 3), []
    for threads in (1, 2):
        out = tmp_path / str(threads)
        succeed("inspect", *world.args[1:-2], "--threads", threads, "--out", out)
        told.append(json.loads((out / "inspect.json").read_text()))
    assert forks
    assert told[0] == told[1]


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("method", ["median", "krum", "cclip", "ties", "dare"])
def test_nan_and_inf_are_named_and_can_be_left_out(tmp_path, method, value, forks):
    world, name = make_world(tmp_path, 5), "layer.0.weight"
    broken = {n: t.clone() for n, t in world.models[2].items()}
    broken[name][-3:] = value  # long enough that random dropping cannot drop all of it
    save_file(broken, world.file("m2"))
    called = (*world.args, *options(method), "--threads", 2)
    problem = refusal(world.root, *called)
    assert problem.startswith(f'model "m2": tensor "{name}" differs from the base by NaN or Inf (')
    assert forks
    assert "--exclude" in problem
    succeed(*called, "--exclude", name)


def fail(number: int) -> NoReturn:
    raise OSError(number, os.strerror(number))


BROKEN: dict[str, Callable[[], object]] = {
    "No space left on device": lambda: fail(errno.ENOSPC),
    "lower --max-shard-size": lambda: fail(errno.EFBIG),
    "free some, or use fewer processes": lambda: os.kill(os.getpid(), signal.SIGKILL),
}


@pytest.mark.parametrize("told", BROKEN)
def test_a_worker_that_fails_or_is_killed_is_one_clear_line_and_leaves_nothing(
    tmp_path: Path, told: str, sabotage: Callable[..., None]
) -> None:
    sabotage(BROKEN[told])
    broken = make_world(tmp_path)
    assert told in refusal(broken.root, *broken.args, "--threads", 2)


def test_an_interrupt_leaves_nothing(tmp_path: Path, sabotage: Callable[..., None]) -> None:
    world = make_world(tmp_path)
    parent, once = os.getpid(), tmp_path / "once"

    def interrupt() -> None:
        with contextlib.suppress(FileNotFoundError):
            once.unlink()
            os.kill(parent, signal.SIGINT)
            signal.pause()  # until the parent, which may be slow to see it, ends this process

    sabotage(interrupt)
    before = files_in(world.root)
    once.touch()
    kept = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored under `nohup .. &`
    outcome = cli(*world.args, "--threads", 2)
    signal.signal(signal.SIGINT, kept)
    assert (outcome.code, outcome.err.strip()) == (130, "interrupted; nothing half-written is left")
    assert files_in(world.root) == before
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)
