"""Clients that train in several processes: the same bits, and no process left behind."""

import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from checkpoint_files import cli
from deltafl.algebra.deltas import Update
from deltafl.errors import DeltaflError
from deltafl.federated import FederatedRecipe, LocalTraining, federate, run_round
from deltafl.federated.rounds import in_workers
from deltafl.federated.server import ServerState
from deltafl.federated.workers import Workers, count_workers, one_thread
from deltafl.training.record import read_rows, without_timings
from federated.worlds import RECIPE, assert_same, begin, normed, plain
from tiny_models import tiny_task, vit_file

SIX = replace(RECIPE, participation_rate=1.0, num_rounds=3, local_steps_spread=2.0)
CPU = torch.device("cpu")


def doubles(model, head, recipe):
    """A user's client whose deltas are of another dtype, too large for the shared memory."""
    usual = LocalTraining(model, head, recipe)

    def client(params, mask, round):
        update = usual(params, mask, round)
        return Update({n: 0.5 * d.double() for n, d in update.delta.items()}, update.source)

    return client


class OddError(Exception):
    """Cannot be made from its own arguments, so it cannot be pickled."""

    def __init__(self, one, two) -> None:
        super().__init__(one)


def raising(model, head, recipe):
    usual = LocalTraining(model, head, recipe)

    def client(params, mask, round):
        if round.client in (2, 4):
            raise ValueError(f"client {round.client} has no data")
        if round.client == 5:
            raise OddError("lost", 2)
        return usual(params, mask, round)

    return client


def dying(model, head, recipe):
    usual = LocalTraining(model, head, recipe)

    def client(params, mask, round):
        if round.number == 2 and round.client == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return usual(params, mask, round)

    return client


RECIPES: dict[str, FederatedRecipe] = {
    "sgd": replace(SIX, grad_clip=0.5, augment="flip"),
    "fedprox": replace(SIX, local_algorithm="fedprox", train_head=True),
    "scaffold": replace(
        SIX, local_algorithm="scaffold", momentum=0.0, participation_rate=0.67, train_head=True
    ),
    "scaffold, mask": replace(SIX, local_algorithm="scaffold", momentum=0.0, sparsity_ratio=0.6),
    "mask, fedadam": replace(SIX, sparsity_ratio=0.6, server_optimizer="fedadam", server_lr=0.02),
    "mask, krum": replace(SIX, sparsity_ratio=0.6, aggregator="krum"),
    "own client": replace(SIX, client="federated.test_workers:doubles", aggregator="median"),
    "a client with NaN": replace(SIX, client="federated.test_federate:one_nan"),
}


def children() -> list[int]:
    """Processes that this one started and has not awaited, dead or alive."""
    return [int(p) for p in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()]


@pytest.fixture(autouse=True)
def no_process_stays():
    before = children()
    yield
    assert children() == before


@pytest.mark.parametrize("name", RECIPES)
def test_results_are_the_same_bits_for_any_number_of_workers(name: str, tmp_path: Path) -> None:
    for count in (1, 2, 4):
        federate(
            normed(), tiny_task(), RECIPES[name], tmp_path / str(count), device="cpu", workers=count,
            save_client_updates={2},
        )  # fmt: skip
    one = tmp_path / "1"
    files = [f.relative_to(one) for f in one.rglob("*.safetensors")]
    assert len(files) >= 2 + 2 * 4
    assert "\nworkers:" not in (one / "config.yaml").read_text()
    rows = without_timings(read_rows(one / "record.jsonl"))
    assert len(rows) == 4
    for count in ("2", "4"):
        for file in files:
            assert (tmp_path / count / file).read_bytes() == (one / file).read_bytes(), (
                file,
                count,
            )
        assert without_timings(read_rows(tmp_path / count / "record.jsonl")) == rows


def test_clients_really_train_in_other_processes_and_send_kept_values_only(tmp_path: Path) -> None:
    begun = begin(tmp_path, replace(SIX, sparsity_ratio=0.6))
    before = {n: t.clone() for n, t in begun.setting.model.tensors().items()}
    seen: list[Update] = []
    with in_workers(begun.world, begun.state, 2) as world:
        assert len(children()) == 2
        for _ in range(2):
            _, result = run_round(begun.state, world, lambda client, update: seen.append(update))
    assert_same(
        begun.setting.model.tensors(), before
    )  # the working model of this process was not used
    assert len({id(u.delta.tuned.index) for u in seen}) == 1  # type: ignore[attr-defined]
    assert {len(u.delta.tuned.kept) for u in seen} == {seen[0].delta.tuned.index.count}  # type: ignore[attr-defined]
    assert result.worker_bytes >= 0
    assert result.client_seconds > 0


def test_an_error_of_a_client_is_raised_as_it_is_the_first_in_order_of_clients(
    tmp_path: Path,
) -> None:
    recipe = replace(SIX, client="federated.test_workers:raising")
    for workers in (1, 3):
        with pytest.raises(ValueError, match="client 2 has no data") as caught:
            federate(
                plain(), tiny_task(), recipe, tmp_path / str(workers), device="cpu", workers=workers
            )
        assert ("in a worker" in "".join(getattr(caught.value, "__notes__", []))) == (workers == 3)


def test_a_worker_that_is_killed_ends_the_run_in_one_line_and_the_run_resumes(
    tmp_path: Path,
) -> None:
    recipe = replace(SIX, client="federated.test_workers:dying")
    words = r"a worker process \(\d+\) ended early \(signal SIGKILL\), perhaps for want of memory"
    with pytest.raises(DeltaflError, match=words):
        federate(plain(), tiny_task(), recipe, tmp_path / "run", device="cpu", workers=2)
    assert (tmp_path / "run" / "state" / "state.safetensors").is_file()


def test_workers_that_died_between_rounds_are_noticed(tmp_path: Path) -> None:
    begun = begin(tmp_path, SIX)
    with in_workers(begun.world, begun.state, 2) as world:
        state, _ = run_round(begun.state, world)
        for pid in children():
            os.kill(pid, signal.SIGKILL)
        with pytest.raises(DeltaflError, match="signal SIGKILL"):
            run_round(state, world)
        with pytest.raises(DeltaflError, match="the worker processes have ended"):
            run_round(state, world)


def test_workers_end_when_their_parent_is_killed() -> None:
    """The parent dies by SIGKILL with a child in the middle of a client's training."""
    code = (
        "import os, signal, torch\n"
        "from deltafl.federated.server import ServerState\n"
        "from deltafl.federated.workers import Workers\n"
        "def train(*arguments):\n"
        "    os.write(1, f'{os.getpid()}\\n'.encode())\n"
        "    os.kill(os.getppid(), signal.SIGKILL)\n"
        "    return None\n"
        "state = ServerState(0, {'w': torch.zeros(3)})\n"
        "list(Workers(2, train, state, 4).train(state, [0, 1]))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, (
        done.stderr
    )  # and no process holds the pipes open any more
    pids = [int(line) for line in done.stdout.split()]
    assert pids
    deadline = time.monotonic() + 60
    while any(running(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert [pid for pid in pids if running(pid)] == []


def running(pid: int) -> bool:
    try:
        return not re.search(r"State:\s+[ZX]", Path(f"/proc/{pid}/status").read_text())
    except FileNotFoundError:
        return False


def test_an_interrupt_leaves_no_process(tmp_path: Path) -> None:
    """Ctrl-C goes to all processes of the terminal: workers leave it to their parent, without a traceback."""
    begun = begin(tmp_path, SIX)

    def interrupt(client, update) -> None:
        for pid in children():
            os.kill(pid, signal.SIGINT)
        time.sleep(0.05)
        assert all(running(pid) for pid in children())
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), in_workers(begun.world, begun.state, 3) as world:
        run_round(begun.state, world, interrupt)


def test_the_number_of_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert count_workers(None, SIX, CPU) == 4
    assert count_workers(None, RECIPE, CPU) == 3  # clients in a round
    assert count_workers(2, SIX, CPU) == 2
    assert count_workers(9, SIX, CPU) == 6
    own = replace(SIX, client="federated.test_workers:doubles")
    assert count_workers(None, own, CPU) == 1  # it may remember things
    assert count_workers(2, own, CPU) == 2
    with pytest.raises(DeltaflError, match="they are for CPUs, and the device is cuda:1"):
        count_workers(3, SIX, torch.device("cuda:1"))
    with pytest.raises(DeltaflError, match="workers must be 1 or more, not 0"):
        count_workers(0, SIX, CPU)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert count_workers(None, SIX, CPU) == 1
    with pytest.raises(DeltaflError, match="where there is a GPU"):
        count_workers(2, SIX, CPU)


def test_a_client_computes_with_one_thread_in_this_process_too(tmp_path: Path) -> None:
    begun = begin(tmp_path, SIX)
    seen: list[int] = []

    def client(params, mask, round):
        seen.append(torch.get_num_threads())
        return begun.world.client(params, mask, round)

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        run_round(begun.state, replace(begun.world, client=client))
        assert torch.get_num_threads() == 2
        with one_thread(torch.device("meta")):
            assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert seen == [1] * 6


def test_processes_see_what_the_parent_writes_before_each_round() -> None:
    def train(params, control, number, client, own):
        return {n: t * client + number for n, t in params.items()}, control, own

    state = ServerState(0, {"w": torch.zeros(4)}, control=torch.zeros(2))
    workers = Workers(3, train, state, 5)
    try:
        for number in (1, 2):
            now = replace(
                state, round=number, params={"w": torch.full((4,), float(number))},
                control=torch.full((2,), 7.0 * number), control_rounds={3: 9},
            )  # fmt: skip
            for client, (update, control, own) in zip(
                range(5), workers.train(now, range(5)), strict=True
            ):
                assert_same(update, {"w": torch.full((4,), number * client + number + 1.0)})
                assert torch.equal(control, now.control)
                assert own == (9 if client == 3 else -1)
    finally:
        workers.close()
        workers.close()


def test_a_run_does_not_wait_for_the_compiler() -> None:
    """Making an optimiser of torch imports it, which takes as long as many rounds."""
    code = (
        "import sys, tempfile, pathlib\n"
        "from federated.worlds import *\n"
        "from deltafl.federated import run_round\n"
        "with tempfile.TemporaryDirectory() as folder:\n"
        "    begun = begin(pathlib.Path(folder), RECIPE)\n"
        "    run_round(begun.state, begun.world)\n"
        "print(sorted({'torch._dynamo', 'torch._inductor'} & sys.modules.keys()))\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )
    assert (done.stdout, done.returncode) == ("[]\n", 0), done.stderr


def test_the_command_line_takes_workers(tmp_path: Path) -> None:
    arguments = [
        "--model",
        vit_file(num_hidden_layers=1),
        "--data",
        "digits",
    ]
    done = cli(
        "federate", *arguments, "--limit", "40", "--workers", "0", "--out", tmp_path / "none"
    )
    assert done.code == 2
    assert "workers must be 1 or more, not 0" in done.err
