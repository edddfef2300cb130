"""Merging in forked processes: the bits and the errors of one process, and nothing is left behind."""

import contextlib
import errno
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from checkpoint_files import cli, files_in, make_world, refusal, succeed
from deltafl.algebra import streaming
from deltafl.pool import Pool, R, T
from deltafl.rules.rule import load_rules

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="the system cannot fork")

PARAMS = {
    "cclip": ["--rho", 0.5, "--unit", "quantile"], "dare": ["--drop-rate", 0.5, "--inner", "ties"],
    "fedgma": ["--rho", 0.6], "fednova": ["--num-steps", 10, 20, 40],
    "fedavg": ["--num-examples", 5, 6, 7],
}  # fmt: skip


@pytest.fixture(autouse=True)
def forks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Every block is a unit of work; how many workers each pass forked."""
    asked: list[int] = []

    class Counted(Pool[T, R]):
        def __init__(self, work, workers, **options) -> None:
            if workers > 1:
                asked.append(workers)
            super().__init__(work, workers, **options)

    monkeypatch.setattr(streaming, "CHUNK", 1)
    monkeypatch.setattr(streaming, "can_fork", lambda: True)
    monkeypatch.setattr(streaming, "Pool", Counted)
    return asked


@pytest.fixture
def sabotage(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], None]], None]:
    """Let every worker do something before it writes."""
    parent, pwrite = os.getpid(), os.pwrite

    def patch(deed: Callable[[], None]) -> None:
        def spoilt(*arguments) -> int:
            if os.getpid() != parent:
                deed()
            return pwrite(*arguments)

        monkeypatch.setattr(os, "pwrite", spoilt)

    return patch


@pytest.mark.parametrize("method", list(load_rules()))
def test_processes_change_no_bit(tmp_path: Path, method: str, forks: list[int]) -> None:
    world = make_world(tmp_path, 3, torch.bfloat16)
    given = [*world.args, "--method", method, *PARAMS.get(method, []), "--exact"]
    succeed(*given, "--threads", 1)
    assert not forks
    wanted = files_in(world.out)
    succeed(*given, "--threads", 3, "--overwrite")
    assert len(forks) >= (2 if method in ("ties", "dare", "cclip", "krum") else 1)
    assert files_in(world.out) == wanted


def test_inspect_says_the_same(tmp_path: Path, forks: list[int]) -> None:
    world, told = make_world(tmp_path, 3), []
    for threads in (1, 2):
        out = tmp_path / str(threads)
        succeed("inspect", *world.args[1:-2], "--threads", threads, "--out", out)
        told.append(json.loads((out / "inspect.json").read_text()))
    assert forks
    assert told[0] == told[1]


@pytest.mark.parametrize("method", ["median", "krum"])
def test_infinity_is_named(tmp_path: Path, method: str, forks: list[int]) -> None:
    world = make_world(tmp_path, 5)
    broken = {n: t.clone() for n, t in world.models[2].items()}
    broken["layer.0.weight"][-1, -1] = torch.inf
    save_file(broken, world.file("m2"))
    problem = refusal(world.root, *world.args, "--method", method, "--threads", 2)
    assert problem.startswith('model "m2": tensor "layer.0.weight" differs from the base by NaN')
    assert forks


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EFBIG])
def test_a_disk_that_fills_is_told_as_in_one_process(
    tmp_path: Path, number: int, sabotage: Callable[..., None]
) -> None:
    def fail() -> None:
        raise OSError(number, os.strerror(number))

    sabotage(fail)
    world = make_world(tmp_path)
    problem = refusal(world.root, *world.args, "--threads", 2)
    assert os.strerror(number) in problem
    assert ("lower --max-shard-size" in problem) == (number == errno.EFBIG)


def test_a_worker_that_is_killed_is_one_clear_line_and_leaves_nothing(
    tmp_path: Path, sabotage: Callable[..., None]
) -> None:
    sabotage(lambda: os.kill(os.getpid(), signal.SIGKILL))
    world = make_world(tmp_path)
    problem = refusal(world.root, *world.args, "--threads", 2)
    assert problem.endswith("free some, or use fewer processes")


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
    outcome = cli(*world.args, "--threads", 2)
    assert (outcome.code, outcome.err.strip()) == (130, "interrupted; nothing half-written is left")
    assert files_in(world.root) == before
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)
