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
from deltafl.rules.rule import Source
from deltafl.tasks import Task
from federated.worlds import RECIPE, begin, federate, halves, normed, one_round, plain


def bad_client(broken: set[int], value: float):
    """A user's client: as ours, but some clients' updates hold one value that is not finite."""

    def make(net: Net, task: Task, recipe: FederatedRecipe):
        ours = LocalTraining(net, task, recipe)

        def train(params, mask, round):
            update = ours(params, mask, round)
            delta = dict(update.delta)
            if round.client in broken:
                delta["last.bias"][3] = value
            return Update(delta, update.source)

        return train

    return make


one_nan = bad_client({1, 4}, float("nan"))
all_inf = bad_client(set(range(100)), float("inf"))


def lacking(net, task, recipe):
    return lambda params, mask, round: Update(
        {"first.weight": params["first.weight"] * 0}, Source("x", 1, 1)
    )


def untrained(net, task, recipe):
    return lambda params, mask, round: Update(
        {n: torch.zeros_like(t) for n, t in params.items()}, Source("x", 5, 1)
    )


def test_an_update_that_is_not_finite_is_left_out_named_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
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


@pytest.mark.parametrize(
    ("client", "words", "changes"),
    [
        (f"{__name__}:all_inf", r"round 1: no client's update is finite \(3 of them\); use a smaller lr", {}),
        (f"{__name__}:lacking", '"client ." and "the server" differ in tensors.*"first.bias"', {}),
        (f"{__name__}:none_such", "none_such", {}),
        ("no_such_module:x", "no_such_module", {}),
        (f"{__name__}:untrained", "scaffold needs clients that return their new control", SCAFFOLD),
    ],
)  # fmt: skip
def test_a_client_that_does_not_fit_is_an_error(
    client: str, words: str, changes: dict, tmp_path: Path
) -> None:
    with pytest.raises(DeltaflError, match=words) as error:
        federate(plain(), halves(), RECIPE.replace(client=client, **changes), tmp_path / "run")
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
def test_bytes_of_rounds(
    changes: dict, encoder, values: int, dense: int | None, tmp_path: Path
) -> None:
    """A mask, a bit for a coordinate, goes to each client once."""
    run = federate(encoder(), halves(), RECIPE.replace(**changes), tmp_path / "run")
    seen: set[int] = set()
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


FEATURES, CLASSES = 5, 3
STATISTICS = 8 * ((FEATURES + 1) ** 2 + (FEATURES + 1) * CLASSES)


@pytest.mark.parametrize(
    ("changes", "up", "down"),
    [
        ({}, 0, 6 * 4 * HEAD_VALUES),
        ({"head": "ridge"}, 6 * STATISTICS, 6 * 4 * HEAD_VALUES),
        ({"head": "probe"}, 50 * (4 * FEATURES + 8), 6 * 4 * HEAD_VALUES),
        ({"head": "ridge", "train_head": True}, 6 * STATISTICS, 0),
        ({"sparsity_ratio": 0.5}, 3 * 4 * PARAMETERS, 6 * 4 * HEAD_VALUES),
        (
            {"sparsity_ratio": 0.5, "calibration_rounds": 2, "train_head": True},
            6 * 4 * PARAMETERS,
            6 * 4 * HEAD_VALUES,
        ),
        ({"sparsity_ratio": 0.5, "mask_strategy": "random", "train_head": True}, 0, 0),
    ],
    ids=str,
)
def test_bytes_of_step_zero_are_told_apart(
    changes: dict, up: int, down: int, tmp_path: Path
) -> None:
    run = federate(plain(), halves(), RECIPE.replace(num_rounds=1, **changes), tmp_path / "run")
    for told in (run.rows[0], run.result):
        assert (told["setup_bytes_up"], told["setup_bytes_down"]) == (up, down)


def test_what_a_client_sends_is_what_is_counted(tmp_path: Path) -> None:
    recipe = RECIPE.replace(sparsity_ratio=0.9, num_rounds=1)
    _, result = one_round(begin(tmp_path / "begun", recipe))
    sent = sum(u.delta.kept.nbytes for u in result.updates.values())
    assert federate(plain(), halves(), recipe, tmp_path / "run").rows[1]["bytes_up"] == sent > 0


def scored(
    monkeypatch: pytest.MonkeyPatch, values: list[float]
) -> list[tuple[str, dict[str, Tensor]]]:
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
