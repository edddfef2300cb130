"""Clients that train in several processes: the same bits, and no process left behind."""

import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from checkpoint_files import fails, python
from deltafl.algebra.deltas import Update
from deltafl.errors import DeltaflError
from deltafl.federated import FederatedRecipe, LocalTraining
from deltafl.federated.rounds import Workers, count_workers, run_round
from deltafl.rules.rule import Source
from deltafl.training.record import read_rows
from federated.worlds import RECIPE, assert_same, begin, federate, halves, normed, one_round, plain
from tiny_models import without_timings

SIX = RECIPE.replace(participation_rate=1.0, num_rounds=3, local_steps_spread=2.0)
CPU = torch.device("cpu")


def doubles(net, task, recipe):
    """A user's client whose deltas are of another dtype, too large for the shared memory."""
    usual = LocalTraining(net, task, recipe)

    def client(params, mask, round):
        update = usual(params, mask, round)
        return Update({n: 0.5 * d.double() for n, d in update.delta.items()}, update.source)

    return client


def raising(net, task, recipe):
    def client(params, mask, round):
        raise ValueError(f"client {round.client} has no data")

    return client


def dying(net, task, recipe):
    usual = LocalTraining(net, task, recipe)

    def client(params, mask, round):
        if round.number == 2 and round.client == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return usual(params, mask, round)

    return client


RECIPES: dict[str, FederatedRecipe] = {
    "sgd": SIX.replace(grad_clip=0.5),
    "fedprox": SIX.replace(local_algorithm="fedprox", train_head=True),
    "scaffold": SIX.replace(
        local_algorithm="scaffold", momentum=0.0, participation_rate=0.67, train_head=True
    ),
    "scaffold, mask": SIX.replace(local_algorithm="scaffold", momentum=0.0, sparsity_ratio=0.6),
    "mask, fedadam": SIX.replace(sparsity_ratio=0.6, server_optimizer="fedadam", server_lr=0.02),
    "mask, krum": SIX.replace(sparsity_ratio=0.6, aggregator="krum"),
    "own client": SIX.replace(client="federated.test_workers:doubles", aggregator="median"),
    "a client with NaN": SIX.replace(client="federated.test_federate:one_nan"),
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
        how = {"workers": count, "save_client_updates": (2,)}
        federate(normed(), halves(), RECIPES[name], tmp_path / str(count), **how)
    one = tmp_path / "1"
    files = [f.relative_to(one) for f in one.rglob("*.safetensors")]
    assert len(files) >= 2 + 2 * 4
    assert "\nworkers:" not in (one / "config.yaml").read_text()
    rows = without_timings(read_rows(one / "record.jsonl"))
    assert len(rows) == 4
    for out in (tmp_path / "2", tmp_path / "4"):
        for file in files:
            assert (out / file).read_bytes() == (one / file).read_bytes(), (out, file)
        assert without_timings(read_rows(out / "record.jsonl")) == rows


def test_clients_really_train_in_other_processes_and_send_kept_values_only(tmp_path: Path) -> None:
    begun = begin(tmp_path, SIX.replace(sparsity_ratio=0.6))
    net = begun.federation.net
    before = net.flat.detach().clone()
    with Workers(begun.federation, begun.state, 2) as workers:
        assert len(children()) == 2
        _, result = run_round(begun.state, begun.federation, workers)
        seen = list(result.updates.values())
    assert torch.equal(net.flat, before)  # the working net of this process was not used
    assert len({id(u.delta.index) for u in seen}) == 1
    assert {len(u.delta.kept) for u in seen} == {len(seen[0].delta.index)}
    assert result.numbers["client_seconds"] > 0


def test_the_error_of_the_first_client_is_raised_as_it_is(tmp_path: Path) -> None:
    recipe = SIX.replace(client="federated.test_workers:raising")
    for workers in (1, 3):
        with pytest.raises(ValueError, match="client 0 has no data") as caught:
            federate(plain(), halves(), recipe, tmp_path / str(workers), workers=workers)
        assert ("in a worker" in "".join(getattr(caught.value, "__notes__", []))) == (workers == 3)


def test_a_worker_that_is_killed_ends_the_run_in_one_line_and_the_run_resumes(tmp_path: Path):
    recipe = SIX.replace(client="federated.test_workers:dying")
    words = r"a worker process \(\d+\) ended early \(signal SIGKILL\), perhaps for want of memory"
    fails(words, federate, plain(), halves(), recipe, tmp_path / "run", workers=2)
    assert (tmp_path / "run" / "state" / "state.pt").is_file()


def test_the_number_of_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    own = SIX.replace(client="federated.test_workers:doubles")  # may remember things
    two, nine = SIX.replace(workers=2), SIX.replace(workers=9)
    asked = (SIX, RECIPE, two, nine, own, own.replace(workers=2))
    assert [count_workers(recipe, CPU) for recipe in asked] == [4, 3, 2, 6, 1, 2]
    with pytest.raises(DeltaflError, match="they are for CPUs, and the device is cuda:1"):
        count_workers(SIX.replace(workers=3), torch.device("cuda:1"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert count_workers(SIX, CPU) == 1
    fails("where there is a GPU", lambda: count_workers(SIX.replace(workers=2), CPU))


def threads(net, task, recipe):
    def client(params, mask, round):
        count = torch.get_num_threads()
        return Update({n: torch.zeros_like(t) for n, t in params.items()}, Source("x", count, 1))

    return client


def test_a_client_computes_with_one_thread_in_this_process_too(tmp_path: Path) -> None:
    begun = begin(tmp_path, SIX.replace(client=f"{__name__}:threads"))
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        _, result = one_round(begun)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert {u.source.num_examples for u in result.updates.values()} == {1}


@pytest.mark.parametrize("count", [1, 3])
def test_processes_see_what_the_server_holds_in_each_round(count: int, tmp_path: Path) -> None:
    begun = begin(tmp_path, SIX.replace(local_algorithm="scaffold", momentum=0.0))

    def client(params, mask, round):
        told = {n: t * round.client + round.number for n, t in params.items()}
        return Update(told | {"control": round.control}, Source(str(round.client)))

    federation = replace(begun.federation, client=client)
    federation.controls.write(3, 1, own := torch.arange(float(len(federation.net.flat))))
    with Workers(federation, begun.state, count) as workers:
        for number in (1, 2):
            params = {n: torch.full_like(t, number) for n, t in begun.state.params.items()}
            control = torch.full_like(own, 7.0 * number)
            now = replace(begun.state, round=number, params=params, control=control)
            for k, (update, _, _) in enumerate(workers.train(now, range(5))):
                rest = dict(update.delta)
                assert torch.equal(rest.pop("control"), control - own if k == 3 else control)
                assert_same(rest, {n: t * k + number + 1 for n, t in params.items()})


def test_a_run_does_not_wait_for_the_compiler() -> None:
    """Making an optimiser of torch imports it, which takes as long as many rounds."""
    code = (
        "import sys, tempfile, pathlib\n"
        "from federated.worlds import *\n"
        "with tempfile.TemporaryDirectory() as folder:\n"
        "    one_round(begin(pathlib.Path(folder), RECIPE))\n"
        "print(sorted({'torch._dynamo', 'torch._inductor'} & sys.modules.keys()))\n"
    )
    done = python(code)
    assert (done.stdout, done.returncode) == ("[]\n", 0), done.stderr
