"""Runs that are killed and go on, and outputs that are in the way."""

import json
import os
import random
import signal
import sys
from pathlib import Path

import pytest
import torch

from checkpoint_files import fails, files_in, python
from deltafl.errors import DeltaflError
from deltafl.federated import FederatedRecipe
from deltafl.federated import run as federated_run
from deltafl.federated.run import StateFile
from deltafl.federated.server import ServerState
from deltafl.federated.setup import Controls
from deltafl.progress import Progress
from deltafl.training.loop import Best
from deltafl.training.record import read_rows
from federated.worlds import RECIPE, federate, halves, language, normed, plain
from tiny_models import without_timings

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
        head="ridge", lr=0.3, server_optimizer="fedyogi", server_lr=0.01, sharding="non_iid", nc=1
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

        for function in ("fsync", "replace", "rename", "unlink", "mkdir"):
            setattr(os, function, counting(getattr(os, function)))
        Path.open = counting(Path.open)  # type: ignore[method-assign]
        StateFile.is_due = lambda self: True  # type: ignore[method-assign]
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
    code = "import sys; from pathlib import Path; from federated.test_resume import *\n"
    done = python(f"{code}kill_again_and_again(Path(sys.argv[1]))", folder)
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
    assert (out / "state" / "state.pt").is_file()


def test_another_configuration_is_refused_by_the_keys_that_differ(tmp_path: Path) -> None:
    stopped(RECIPE, tmp_path / "run")
    other = RECIPE.replace(lr=0.06, momentum=0.5)
    with pytest.raises(DeltaflError) as error:
        federate(plain(), halves(), other, tmp_path / "run", resume=True)
    lines = error.value.problems
    assert [x for x in lines if "lr = 0.05, now it is 0.06" in x]
    assert [x for x in lines if "momentum = 0.9, now it is 0.5" in x]
    assert len(lines) == 3
    with pytest.raises(DeltaflError, match="num_examples = 50, now it is 40"):
        federate(plain(), halves(train=40), RECIPE, tmp_path / "run", resume=True)
    federate(plain(), halves(), RECIPE, tmp_path / "run", resume=True)


def test_a_torn_state_is_one_clear_line(tmp_path: Path) -> None:
    stopped(RECIPE, tmp_path / "run")
    file = tmp_path / "run" / "state" / "state.pt"
    data = file.read_bytes()
    for damaged in (data[:100], data[:-1], b"", b"\xff" * len(data)):
        file.write_bytes(damaged)
        words = r'"[^"]*state\.pt" is not the state of a run; delete it to start again'
        with pytest.raises(DeltaflError, match=words) as error:
            federate(plain(), halves(), RECIPE, tmp_path / "run", resume=True)
        assert len(error.value.problems) == 1
    file.unlink()
    again = federate(plain(), halves(), RECIPE, tmp_path / "run", resume=True)
    fresh = federate(plain(), halves(), RECIPE, tmp_path / "fresh")
    assert without_timings(again.rows) == without_timings(fresh.rows)


def test_resuming_what_is_finished_returns_it_and_what_was_never_begun_begins_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = federate(plain(), halves(), RECIPE, tmp_path / "run", resume=True)
    files = files_in(tmp_path)
    monkeypatch.setattr(federated_run, "run_round", None)
    assert federate(plain(), halves(), RECIPE, tmp_path / "run", resume=True) == done
    assert files_in(tmp_path) == files


def test_an_output_is_replaced_only_when_asked_and_by_a_recipe_that_can_run(tmp_path: Path) -> None:
    out = tmp_path / "run"
    federate(plain(), halves(), RECIPE, out, save_client_updates=(2,))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    before = files_in(tmp_path)
    fails(r"exists.*--overwrite", federate, plain(), halves(), RECIPE, out)
    for options in ({"overwrite": True}, {"resume": True}):
        with pytest.raises(DeltaflError):
            federate(plain(), halves(), RECIPE, tmp_path / "mine", **options)
    for changes in (
        {"lr": -1.0},
        {"head": "no/such/head.safetensors"},
        {"sharding": "non_iid", "nc": 4},
        {"num_clients": 51},
        {"mask_file": "no/such/mask.safetensors"},
        {"client": "no_such_module:client"},
    ):
        with pytest.raises(DeltaflError):
            federate(plain(), halves(), RECIPE.replace(**changes), out, overwrite=True)
        assert files_in(tmp_path) == before, changes
    assert (out / "updates" / "round-0002").is_dir()
    new = federate(plain(), halves(), RECIPE.replace(seed=9), out, overwrite=True)
    assert not (out / "updates").exists()
    assert new.result["config"]["seed"] == 9


def test_the_state_of_an_older_run_is_not_read_by_the_one_that_replaces_it(tmp_path: Path) -> None:
    stopped(RECIPE, tmp_path / "run")
    other = RECIPE.replace(lr=0.01)
    new = federate(plain(), halves(), other, tmp_path / "run", overwrite=True)
    fresh = federate(plain(), halves(), other, tmp_path / "fresh")
    assert without_timings(new.rows) == without_timings(fresh.rows)


def test_states_are_written_in_a_hundredth_of_the_time_and_the_first_at_once(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(federated_run.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(federated_run, "write_state", lambda *a: now.__setitem__(0, now[0] + 2))
    kept = StateFile(tmp_path / "state.pt", {})
    assert kept.is_due()
    kept.write(ServerState(1, {}), Best())
    for passed, due in ((0, False), (199, False), (1, True)):
        now[0] += passed
        assert kept.is_due() == due


def test_controls_that_no_later_round_reads_are_deleted(tmp_path: Path) -> None:
    controls, like = Controls(tmp_path), torch.empty(3)
    for client, number in ((1, 1), (1, 3), (2, 2)):
        controls.write(client, number, torch.full((3,), float(10 * client + number)))
    controls.prune(3, 4)
    assert len([*tmp_path.iterdir()]) == 3
    for number, value in ((1, 0.0), (2, 11.0), (3, 11.0), (4, 13.0)):
        assert torch.equal(controls.read(1, number, like), torch.full((3,), value))
    controls.prune(4, 4)
    assert len([*tmp_path.iterdir()]) == 2
    assert torch.equal(controls.read(1, 4, like), torch.full((3,), 13.0))
    assert torch.equal(controls.read(3, 4, like), torch.zeros(3))
