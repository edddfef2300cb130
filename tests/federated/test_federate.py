"""Whole runs: what is counted, what is chosen, what is refused."""

import logging
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from deltafl.algebra.deltas import Update
from deltafl.errors import DeltaflError
from deltafl.federated import FederatedRecipe, LocalTraining
from deltafl.federated import run as federated_run
from deltafl.models import Net, load_net
from deltafl.tasks import Task
from federated.worlds import RECIPE, begin, federate, halves, normed, one_round, plain


def changed(how):
    """A user's client: as ours, with its update changed by `how(client, delta)`."""

    def make(net: Net, task: Task, recipe: FederatedRecipe):
        ours = LocalTraining(net, task, recipe)

        def train(params, mask, round):
            update = ours(params, mask, round)
            return Update(how(round.client, dict(update.delta)), update.source)

        return train

    return make


def broken(clients, value: float):
    def how(client, delta):
        if client in clients:
            delta["last.bias"][3] = value
        return delta

    return changed(how)


one_nan = broken({1, 4}, float("nan"))
all_inf = broken(range(100), float("inf"))
lacking = changed(lambda client, delta: {"first.weight": delta["first.weight"]})
uncontrolled = changed(lambda client, delta: {n: t for n, t in delta.items() if n != "control"})


def test_an_update_that_is_not_finite_is_left_out_named_and_counted(tmp_path, caplog):
    recipe = RECIPE.replace(
        client="federated.test_federate:one_nan", aggregator="median", server_optimizer="fedadam"
    )
    with caplog.at_level(logging.WARNING):
        run = federate(plain(), halves(), recipe, tmp_path / "run")
    expected = {r: [k for k in recipe.clients_in(r) if k in (1, 4)] for r in range(1, 5)}
    assert sum(map(len, expected.values())) == run.result["failed_updates"] > 1
    assert {r["round"]: r["failed"] for r in run.rows[1:]} == expected
    assert [m for m in caplog.messages if "NaN" in m] == [
        f"round {r}: the update of client {k} has NaN or Inf and is left out"
        for r, ks in expected.items()
        for k in ks
    ]
    saved = load_net(tmp_path / "run" / "model").module.state_dict()
    assert all(t.isfinite().all() for t in saved.values())


def test_the_round_is_that_of_the_others(tmp_path: Path) -> None:
    recipe = RECIPE.replace(participation_rate=1.0, client="federated.test_federate:one_nan")
    begun = begin(tmp_path, recipe)
    state, result = one_round(begun)
    assert (list(result.updates), result.numbers["failed"]) == ([0, 2, 3, 5], [1, 4])
    told = [(u.source.num_examples or 0, u.delta["first.weight"]) for u in result.updates.values()]
    mean = sum(n * delta for n, delta in told) / sum(n for n, _ in told)
    expected = begun.state.params["first.weight"] + mean
    torch.testing.assert_close(state.params["first.weight"], expected)


SCAFFOLD = {"local_algorithm": "scaffold", "momentum": 0.0}


MISFITS = {
    "all_inf": r"round 1: no client's update is finite \(3 of them\); use a smaller lr",
    "lacking": '"client ." and "the server" differ in tensors.*"first.bias"',
    "uncontrolled": "scaffold needs clients that return their new control",
    "none_such": "none_such",
}


@pytest.mark.parametrize("name", MISFITS)
def test_a_client_that_does_not_fit_is_an_error(name: str, tmp_path: Path) -> None:
    recipe = RECIPE.replace(client=f"{__name__}:{name}")
    recipe = recipe.replace(**SCAFFOLD) if name == "uncontrolled" else recipe
    with pytest.raises(DeltaflError, match=MISFITS[name]) as error:
        federate(plain(), halves(), recipe, tmp_path / "run")
    assert len(error.value.problems) == 1


PARAMETERS = 64 * 12 + 12 + 12 * 5 + 5
HEAD_VALUES = 3 * 5 + 3
BITS = -(-PARAMETERS // 8)


@pytest.mark.parametrize(
    ("changes", "encoder", "values", "dense"),
    [
        ({"train_head": True}, plain, PARAMETERS + HEAD_VALUES, None),
        # weight and bias of the norm; mean and variance, that move too
        ({}, normed, PARAMETERS + 2 * 3 + 2 * 3, None),
        (SCAFFOLD | {"train_head": True}, plain, 2 * (PARAMETERS + HEAD_VALUES), None),
        (SCAFFOLD, normed, 2 * (PARAMETERS + 6) + 6, None),
        ({"sparsity_ratio": 0.9}, plain, round(0.1 * PARAMETERS), PARAMETERS),
        (SCAFFOLD | {"sparsity_ratio": 0.9}, plain, 2 * round(0.1 * PARAMETERS), 2 * PARAMETERS),
    ],
)
def test_bytes_of_rounds(changes: dict, encoder, values: int, dense: int | None, tmp_path: Path):
    """A mask, a bit for a coordinate, goes to each client once; what a client sends is what is counted."""
    recipe, seen = RECIPE.replace(**changes), set[int]()
    run = federate(encoder(), halves(), recipe, tmp_path / "run")
    for n, row in enumerate(run.rows[1:], 1):
        fresh = set(row["clients"]) - seen
        seen |= fresh
        assert row["bytes_up"] == 4 * values * 3
        assert row["bytes_down"] == row["bytes_up"] + bool(dense) * BITS * len(fresh)
        assert row["bytes_up_total"] == 4 * values * 3 * n
        assert row["bytes_down_total"] == row["bytes_up_total"] + bool(dense) * BITS * len(seen)
        assert row["dense_bytes_up_total"] == 4 * (dense or values) * 3 * n
    assert len(seen) > 3
    for key in ("bytes_up_total", "bytes_down_total", "dense_bytes_up_total"):
        assert run.result[key] == run.rows[-1][key]
    if changes == {"sparsity_ratio": 0.9}:
        _, first = one_round(begin(tmp_path / "begun", recipe))
        sent = sum(u.delta.kept.nbytes for u in first.updates.values())
        assert run.rows[1]["bytes_up"] == sent > 0


FEATURES, CLASSES = 5, 3
STATISTICS = 8 * ((FEATURES + 1) ** 2 + (FEATURES + 1) * CLASSES)


@pytest.mark.parametrize(
    ("changes", "up", "down"),
    [
        ({}, 0, True),
        ({"head": "ridge"}, 6 * STATISTICS, True),
        ({"head": "probe"}, 50 * (4 * FEATURES + 8), True),
        ({"head": "ridge", "train_head": True}, 6 * STATISTICS, False),
        ({"sparsity_ratio": 0.5}, 3 * 4 * PARAMETERS, True),
        ({"sparsity_ratio": 0.5, "calibration_rounds": 2, "train_head": True}, 6 * 4 * PARAMETERS, True),
        ({"sparsity_ratio": 0.5, "mask_strategy": "random", "train_head": True}, 0, False),
    ],
    ids=str,
)  # fmt: skip
def test_bytes_of_step_zero_are_told_apart(changes: dict, up: int, down: bool, tmp_path: Path):
    run = federate(plain(), halves(), RECIPE.replace(num_rounds=1, **changes), tmp_path / "run")
    for told in (run.rows[0], run.result):
        assert told["setup_bytes_up"] == up
        assert told["setup_bytes_down"] == 6 * 4 * HEAD_VALUES * down


def scored(monkeypatch, values: list[float]) -> list[tuple[str, dict[str, Tensor]]]:
    """Validation finds these values one after the other, the test 0.5; the split and parameters of each look."""
    looks: list[tuple[str, dict[str, Tensor]]] = []
    left, original = list(values), federated_run.score_of

    def score(federation, params, split):
        looks.append((split, {n: t.clone() for n, t in params.items()}))
        original(federation, params, split)
        return left.pop(0) if split == "val" else 0.5

    monkeypatch.setattr(federated_run, "score_of", score)
    return looks


@pytest.mark.parametrize(
    ("values", "best"),
    [
        ([0.1, 0.5, 0.3, 0.5, 0.4], 1),
        ([0.6, 0.5, 0.3, 0.5, 0.6], 0),
        ([0.1, 0.2, 0.3, 0.4, 0.5], 4),
        ([-7.0, -3.5, -5.0, -4.0, -3.6], 1),  # a log-likelihood
        ([math.nan, -2.0, math.nan, -3.0, -4.0], 1),
    ],
)
def test_the_best_round_is_chosen_on_validation_and_tested_once(
    values: list[float], best: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = scored(monkeypatch, values)
    run = federate(plain(), halves(), RECIPE, tmp_path / "run")
    assert [split for split, _ in looks] == ["val"] * 5 + ["test"]
    found = (run.result["best_round"], run.result["val_score"], run.result["test_score"])
    assert found == (best, values[best], 0.5)
    told = [None if math.isnan(v) else v for v in values]
    assert [r["val_score"] for r in run.rows] == told
    saved = load_net(tmp_path / "run" / "model").module.state_dict()
    for name, tensor in looks[best][1].items():
        assert torch.equal(saved[f"encoder.{name}"], tensor)
        assert torch.equal(looks[-1][1][name], tensor)


def test_validation_every_few_rounds_and_patience_counts_those_without_a_gain(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = federate(plain(), halves(), RECIPE.replace(num_rounds=5, eval_every=2), tmp_path / "a")
    assert [r["round"] for r in run.rows if r["val_score"] is not None] == [0, 2, 4, 5]
    scored(monkeypatch, [0.1, 0.3, 0.3, 0.4, 0.4, 0.2, 0.9, 0.9])
    recipe = RECIPE.replace(num_rounds=14, eval_every=2, patience=2)
    run = federate(plain(), halves(), recipe, tmp_path / "run")
    assert run.rows[-1]["round"] == run.result["rounds"] == 10
    assert run.result["best_round"] == 6
