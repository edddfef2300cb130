"""Runs that are killed and go on, and outputs that are in the way."""

import json
import os
import random
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from deltafl.errors import DeltaflError
from deltafl.federated import FederatedRecipe
from deltafl.federated import run as federated_run
from deltafl.federated import state as federated_state
from deltafl.federated.scaffold import Controls
from deltafl.federated.server import ServerState
from deltafl.federated.state import Best, StateWriter, read_state, write_state
from deltafl.progress import Progress
from deltafl.training.record import read_rows, without_timings
from federated.worlds import RECIPE, assert_same, federate, halves, language, normed, plain

LONG = RECIPE.replace(num_rounds=8)
RECIPES: dict[str, FederatedRecipe] = {
    "scaffold": LONG.replace(local_algorithm="scaffold", momentum=0.0, train_head=True),
    "fedadam, mask": LONG.replace(
        server_optimizer="fedadam", sparsity_ratio=0.6, server_lr=0.02, eval_every=2
    ),
    "trained head, patience": LONG.replace(
        train_head=True, patience=3, server_momentum=0.5, lr=0.2
    ),
    "language": LONG.replace(
        lr=0.3, server_optimizer="fedyogi", server_lr=0.01, sharding="non_iid", nc=1
    ),
    "ridge, fednova": LONG.replace(head="ridge", aggregator="fednova", local_steps_spread=2.0),
}

TURNS = 2


def run(name: str, out: Path, **options) -> None:
    net, task = language() if name == "language" else (normed(), halves())
    federate(net, task, RECIPES[name], out, **options)


def killed_at(event: int, name: str, out: Path, workers: int) -> tuple[bool, int]:
    """Run, or resume, in a child that kills itself at its event-th write, sync or rename, in an order that
    no thread decides: whether it was killed, and else how many of these it made.
    """
    ours, theirs = os.pipe()
    child = os.fork()
    if child:
        os.close(theirs)
        status = os.waitpid(child, 0)[1]
        with os.fdopen(ours) as answer:
            events = answer.read()
        assert os.WIFSIGNALED(status) or status == 0, (name, event, status)
        return os.WIFSIGNALED(status), int(events or 0)
    try:
        done = 0

        def counting(original):
            def call(*arguments, **options):
                nonlocal done
                done += 1
                if done == event:
                    os.kill(os.getpid(), signal.SIGKILL)
                return original(*arguments, **options)

            return call

        def at_once(writer: StateWriter, state: ServerState, best: Best) -> bool:
            writer._write(state, best)
            return True

        for function in ("fsync", "replace", "rename", "truncate", "unlink", "mkdir"):
            setattr(os, function, counting(getattr(os, function)))
        Path.open = counting(Path.open)  # type: ignore[method-assign]
        StateWriter.offer = at_once  # type: ignore[method-assign]
        run(name, out, resume=True, workers=workers)
        os.write(theirs, str(done).encode())
        os._exit(0)
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        os._exit(1)


def kill_again_and_again(folder: Path) -> None:
    """For each recipe a whole run, and runs that are killed up to five times where they stand, until they finish."""
    draw = random.Random(0)
    for name in RECIPES:  # what is imported on the way is then there in every child
        run(name, folder / f"whole {name}")
    for name in RECIPES:
        was_killed, events = killed_at(0, name, folder / f"counted {name}", workers=1)
        assert not was_killed
        assert events > 50
        for turn in range(TURNS):
            out = folder / f"{name} {turn}"
            first = events * (turn + 1) // (TURNS + 1)
            assert killed_at(first, name, out, workers=1 + turn)[0]
            for _ in range(4):
                killed_at(draw.randint(1, events), name, out, workers=1 + turn)
            assert not killed_at(0, name, out, workers=1)[0]


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the killed runs, made in a process of one thread."""
    folder = tmp_path_factory.mktemp("killed")
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(sys.path),
        "OMP_NUM_THREADS": "1",
    }
    code = f"from pathlib import Path; from federated.test_resume import *; kill_again_and_again(Path({str(folder)!r}))"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("name", RECIPES)
def test_a_killed_run_ends_as_one_that_was_not(name: str, killed: Path) -> None:
    whole = killed / f"whole {name}"
    rows = without_timings(read_rows(whole / "record.jsonl"))
    assert len(rows) > 4
    for turn in range(TURNS):
        out = killed / f"{name} {turn}"
        for file in (whole / "model").iterdir():
            assert (out / "model" / file.name).read_bytes() == file.read_bytes(), (file, turn)
        assert without_timings(read_rows(out / "record.jsonl")) == rows
        results = [json.loads((f / "result.json").read_text()) for f in (out, whole)]
        assert without_timings(results[:1]) == without_timings(results[1:])
        assert sorted(f.name for f in out.iterdir()) == sorted(f.name for f in whole.iterdir())
        assert not list(out.rglob("*.tmp"))


class StopHereError(Exception):
    pass


def stopped(recipe: FederatedRecipe, out: Path, after: int = 3) -> None:
    """A run that ended, with its state written, after so many rounds."""

    def stop(progress: Progress) -> None:
        if progress.done == after:
            raise StopHereError

    with pytest.raises(StopHereError):
        federate(plain(), halves(), recipe, out, device="cpu", on_progress=stop)
    assert (out / "state" / "state.safetensors").is_file()


def test_another_configuration_is_refused_by_the_keys_that_differ(tmp_path: Path) -> None:
    stopped(RECIPE, tmp_path / "run")
    with pytest.raises(DeltaflError) as error:
        federate(
            plain(),
            halves(),
            RECIPE.replace(lr=0.06, momentum=0.5),
            tmp_path / "run",
            resume=True,
        )
    lines = error.value.problems
    assert [x for x in lines if "lr = 0.05, now it is 0.06" in x]
    assert [x for x in lines if "momentum = 0.9, now it is 0.5" in x]
    assert len(lines) == 3
    with pytest.raises(DeltaflError, match="num_examples = 50, now it is 40"):
        federate(plain(), halves(train=40), RECIPE, tmp_path / "run", resume=True)
    federate(plain(), halves(), RECIPE, tmp_path / "run", resume=True)


@pytest.mark.parametrize(
    "damage", ["cut in the header", "cut in the data", "empty", "garbage", "no numbers", "other"]
)
def test_a_torn_state_is_one_clear_line(damage: str, tmp_path: Path) -> None:
    stopped(RECIPE, tmp_path / "run")
    file = tmp_path / "run" / "state" / "state.safetensors"
    data = file.read_bytes()
    other = ServerState(1, {"first.weight": torch.zeros(2)})
    write_state(tmp_path / "other", other, Best(other.params, 1, 0.5))
    file.write_bytes(
        {
            "cut in the header": data[:100],
            "cut in the data": data[:-1],
            "empty": b"",
            "garbage": b"\xff" * len(data),
            "no numbers": data.replace(b'\\"round\\"', b'\\"roand\\"'),
            "other": (tmp_path / "other").read_bytes(),
        }[damage]
    )
    assert file.read_bytes() != data
    with pytest.raises(
        DeltaflError, match=r'"[^"]*state\.safetensors".*delete the folder to start again'
    ) as error:
        federate(plain(), halves(), RECIPE, tmp_path / "run", resume=True)
    assert len(error.value.problems) == 1
    assert "\n" not in str(error.value)


def test_resuming_what_is_finished_returns_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = federate(plain(), halves(), RECIPE, tmp_path / "run")
    files = {f: f.read_bytes() for f in (tmp_path / "run").rglob("*") if f.is_file()}
    monkeypatch.setattr(federated_run, "run_round", None)
    again = federate(plain(), halves(), RECIPE, tmp_path / "run", resume=True)
    assert again == done
    assert {f: f.read_bytes() for f in (tmp_path / "run").rglob("*") if f.is_file()} == files


def test_resuming_what_was_never_begun_begins_it(tmp_path: Path) -> None:
    first = federate(plain(), halves(), RECIPE, tmp_path / "a", resume=True)
    second = federate(plain(), halves(), RECIPE, tmp_path / "b")
    assert without_timings(first.rows) == without_timings(second.rows)


def test_an_output_is_replaced_only_when_asked(tmp_path: Path) -> None:
    out = tmp_path / "run"
    federate(plain(), halves(), RECIPE, out, device="cpu", save_client_updates=(2,))
    with pytest.raises(DeltaflError, match=r"exists.*--overwrite"):
        federate(plain(), halves(), RECIPE, out)
    assert (out / "updates" / "round-0002").is_dir()
    new = federate(plain(), halves(), RECIPE.replace(seed=9), out, overwrite=True)
    assert not (out / "updates").exists()
    assert new.result["config"]["seed"] == 9
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    for options in ({"overwrite": True}, {"resume": True}):
        with pytest.raises(DeltaflError):
            federate(plain(), halves(), RECIPE, tmp_path / "mine", **options)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize(
    "changes",
    [
        {"lr": -1.0},
        {"head": "no/such/head.safetensors"},
        {"sharding": "non_iid", "nc": 4},
        {"num_clients": 51},
        {"sparsity_ratio": 0.5, "calibration_rounds": 3},
        {"mask_file": "no/such/mask.safetensors"},
        {"client": "no_such_module:client"},
    ],
    ids=str,
)
def test_a_bad_recipe_leaves_an_older_run_alone(changes: dict, tmp_path: Path) -> None:
    out = tmp_path / "run"
    federate(plain(), halves(), RECIPE, out)
    before = {f: f.read_bytes() for f in out.rglob("*") if f.is_file()}
    with pytest.raises(DeltaflError):
        federate(plain(), halves(), RECIPE.replace(**changes), out, overwrite=True)
    assert {f: f.read_bytes() for f in tmp_path.rglob("*") if f.is_file()} == before


def test_the_state_of_an_older_run_is_not_read_by_the_one_that_replaces_it(tmp_path: Path) -> None:
    stopped(RECIPE, tmp_path / "run")
    other = RECIPE.replace(lr=0.01)
    new = federate(plain(), halves(), other, tmp_path / "run", overwrite=True)
    fresh = federate(plain(), halves(), other, tmp_path / "fresh")
    assert without_timings(new.rows) == without_timings(fresh.rows)


def full_state() -> tuple[ServerState, Best]:
    def tensors(seed: int) -> dict[str, torch.Tensor]:
        draw = torch.Generator().manual_seed(seed)
        return {"w": torch.randn(3, 2, generator=draw), "b": torch.randn(4, generator=draw)}

    state = ServerState(
        5, tensors(0), tensors(1), tensors(2), control=torch.randn(10), control_rounds={3: 2, 11: 5}
    )
    return state, Best(tensors(4), 2, 0.1 + 0.2, waited=3)


@pytest.mark.parametrize("best_round", [2, 5])
def test_a_state_comes_back_bit_for_bit(best_round: int, tmp_path: Path) -> None:
    state, best = full_state()
    best = replace(best, round=best_round, params=state.params if best_round == 5 else best.params)
    write_state(tmp_path / "state", state, best)
    empty = {n: torch.zeros_like(t) for n, t in state.params.items()}
    like = ServerState(0, empty, control=torch.zeros(10))
    found, found_best = read_state(tmp_path / "state", like)
    for part in ("params", "m", "v"):
        assert_same(getattr(found, part), getattr(state, part))
    assert_same(found_best.params, best.params)
    assert torch.equal(found.control, state.control)
    assert (found.round, found.control_rounds) == (5, {3: 2, 11: 5})
    assert replace(found_best, params={}) == replace(best, params={})


def test_the_record_is_on_the_disk_before_the_state_that_counts_on_it(tmp_path: Path) -> None:
    seen: list[bool] = []
    file = tmp_path / "state.safetensors"
    writer = StateWriter(file, lambda: seen.append(file.exists()))
    assert writer.offer(*full_state())
    writer.finish()
    assert seen == [False]
    assert file.exists()


def test_states_are_written_in_a_hundredth_of_the_time_and_the_first_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr(federated_state.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(
        federated_state, "write_state", lambda *arguments: now.__setitem__(0, now[0] + 2)
    )
    writer = StateWriter(tmp_path / "state.safetensors")
    assert writer.offer(*full_state())
    writer.finish()
    for passed, writes in ((0, False), (199, False), (1, True)):
        now[0] += passed
        assert writer.offer(*full_state()) == writes
        writer.finish()


def test_a_state_that_cannot_be_written_ends_the_run(tmp_path: Path) -> None:
    (tmp_path / "state").write_text("a file where a folder must be")
    writer = StateWriter(tmp_path / "state" / "state.safetensors")
    writer.offer(*full_state())
    with pytest.raises(OSError, match="state"):
        writer.finish()


def test_controls_that_no_state_refers_to_are_deleted(tmp_path: Path) -> None:
    controls = Controls(tmp_path)
    for client, number in ((1, 1), (1, 3), (1, 4), (2, 2)):
        controls.write(client, number, torch.full((3,), float(10 * client + number)))
    controls.prune(ServerState(4, {}, control_rounds={1: 3}))
    assert sorted(f.name for f in tmp_path.iterdir()) == [
        "client-1-round-3.safetensors", "client-1-round-4.safetensors", "client-2-round-2.safetensors",
    ]  # fmt: skip
    assert torch.equal(controls.read(1, 3), torch.full((3,), 13.0))
