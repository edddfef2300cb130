"""Whole runs: what is counted, what is chosen, what is refused."""

import logging
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from deltafl.algebra.deltas import Update
from deltafl.errors import DeltaflError
from deltafl.federated import FederatedRecipe, LocalTraining
from deltafl.federated import callbacks as federated_callbacks
from deltafl.federated.callbacks import Bytes, score_of
from deltafl.models import Net, load_net
from deltafl.rules.rule import Source
from deltafl.tasks import Images, Task
from deltafl.training.step import scores
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
        client="federated.test_federate:one_nan",
        aggregator="median",
        server_optimizer="fedadam",
    )
    with caplog.at_level(logging.WARNING):
        run = federate(plain(), halves(), recipe, tmp_path / "run")
    expected = {r: [k for k in recipe.clients_in(r) if k in (1, 4)] for r in range(1, 5)}
    assert sum(map(len, expected.values())) > 1
    rows = {r["round"]: r for r in run.rows if r["event"] == "round"}
    assert {r: row["failed"] for r, row in rows.items()} == expected
    assert run.result["failed_updates"] == sum(map(len, expected.values()))
    assert sorted(m for m in caplog.messages if "NaN" in m) == sorted(
        f"round {r}: the update of client {k} has NaN or Inf and is left out"
        for r, ks in expected.items()
        for k in ks
    )
    saved = load_net(tmp_path / "run" / "model").module.state_dict()
    assert all(t.isfinite().all() for t in saved.values())


def test_the_round_is_that_of_the_others(tmp_path: Path) -> None:
    with_bad = begin(
        tmp_path, RECIPE.replace(participation_rate=1.0, client="federated.test_federate:one_nan")
    )
    state, result = one_round(with_bad)
    told = list(result.updates.values())
    assert list(result.updates) == [0, 2, 3, 5]
    assert result.failed == (1, 4)
    total = sum(u.source.num_examples or 0 for u in told)
    mean = sum(u.delta["first.weight"] * ((u.source.num_examples or 0) / total) for u in told)
    torch.testing.assert_close(
        state.params["first.weight"], with_bad.state.params["first.weight"] + mean
    )


def test_no_finite_update_at_all_is_an_error(tmp_path: Path) -> None:
    recipe = RECIPE.replace(client="federated.test_federate:all_inf")
    with pytest.raises(
        DeltaflError, match=r"round 1: no client's update is finite \(3 of them\); use a smaller lr"
    ):
        federate(plain(), halves(), recipe, tmp_path / "run")


@pytest.mark.parametrize(
    ("client", "words"),
    [
        (
            "federated.test_federate:lacking",
            'update of client .* has not the tensors.*"first.bias"',
        ),
        ("federated.test_federate:none_such", "none_such"),
        ("no_such_module:x", "no_such_module"),
    ],
)
def test_a_client_that_does_not_fit_is_an_error(client: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(DeltaflError, match=words):
        federate(plain(), halves(), RECIPE.replace(client=client), tmp_path / "run", device="cpu")


def test_scaffold_needs_a_client_that_knows_it(tmp_path: Path) -> None:
    recipe = RECIPE.replace(
        local_algorithm="scaffold", momentum=0.0, client="federated.test_federate:untrained"
    )
    with pytest.raises(DeltaflError, match="scaffold needs clients that return their new control"):
        federate(plain(), halves(), recipe, tmp_path / "run")


PARAMETERS = 64 * 12 + 12 + 12 * 5 + 5
HEAD_VALUES = 3 * 5 + 3


def rows_of(
    recipe: FederatedRecipe, tmp_path: Path, net=plain
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    run = federate(net(), halves(), recipe, tmp_path)
    return [dict(r) for r in run.rows if r["event"] == "round"], dict(run.result)


@pytest.mark.parametrize(
    ("changes", "encoder", "values"),
    [
        ({}, plain, PARAMETERS),
        ({"train_head": True}, plain, PARAMETERS + HEAD_VALUES),
        (
            {},
            normed,
            PARAMETERS + 2 * 3 + 2 * 3,
        ),  # weight and bias of the norm; mean and variance, that move too
        ({"local_algorithm": "scaffold", "momentum": 0.0}, plain, 2 * PARAMETERS),
        (
            {"local_algorithm": "scaffold", "momentum": 0.0, "train_head": True},
            plain,
            2 * (PARAMETERS + HEAD_VALUES),
        ),
        ({"local_algorithm": "scaffold", "momentum": 0.0}, normed, 2 * (PARAMETERS + 6) + 6),
    ],
)
def test_bytes_of_a_dense_run(changes: dict, encoder, values: int, tmp_path: Path) -> None:
    rows, result = rows_of(RECIPE.replace(**changes), tmp_path / "run", encoder)
    assert [r["bytes_up"] for r in rows] == [r["bytes_down"] for r in rows] == [4 * values * 3] * 4
    assert [r["bytes_up_total"] for r in rows] == [4 * values * 3 * n for n in range(1, 5)]
    assert (
        result["bytes_up_total"]
        == result["bytes_down_total"]
        == result["dense_bytes_up_total"]
        == 48 * values
    )


@pytest.mark.parametrize("algorithm", ["sgd", "scaffold"])
def test_bytes_of_a_sparse_run(algorithm: str, tmp_path: Path) -> None:
    """The values are a tenth of a dense upload; the mask, a bit for a coordinate, goes to each client once."""
    recipe = RECIPE.replace(sparsity_ratio=0.9, momentum=0.0, local_algorithm=algorithm)
    rows, result = rows_of(recipe, tmp_path / "run")
    kept, double = round(0.1 * PARAMETERS), 2 if algorithm == "scaffold" else 1
    bits = -(-PARAMETERS // 8)
    seen: set[int] = set()
    for row in rows:
        fresh = set(row["clients"]) - seen
        seen |= fresh
        assert row["bytes_up"] == 4 * kept * 3 * double
        assert row["bytes_down"] == row["bytes_up"] + bits * len(fresh)
    assert len(seen) > 3
    assert result["bytes_down_total"] - result["bytes_up_total"] == bits * len(seen)
    assert result["bytes_up_total"] / result["dense_bytes_up_total"] == pytest.approx(
        0.1, rel=1 / kept
    )


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
    run = federate(
        plain(),
        halves(),
        RECIPE.replace(num_rounds=1, **changes),
        tmp_path / "run",
        device="cpu",
    )
    for told in (run.rows[0], run.result):
        assert (told["setup_bytes_up"], told["setup_bytes_down"]) == (up, down)


def test_what_a_client_sends_is_what_is_counted(tmp_path: Path) -> None:
    begun = begin(tmp_path, RECIPE.replace(sparsity_ratio=0.9, momentum=0.0))
    state, result = one_round(begun)
    sent = [u.delta.kept.nbytes for u in result.updates.values()]
    row: dict[str, Any] = {}
    Bytes(begun.federation).after(state, result, row)
    assert sum(sent) == row["bytes_up"] > 0


def test_bytes_that_are_counted_from_a_later_round_on_are_the_same(tmp_path: Path) -> None:
    begun = begin(tmp_path, RECIPE.replace(sparsity_ratio=0.9))
    state, result = one_round(begun)
    whole, rows = Bytes(begun.federation), []
    for number in (1, 2, 3):
        rows.append({})
        whole.after(replace(state, round=number), result, rows[-1])
    late: dict[str, Any] = {}
    Bytes(begun.federation).after(replace(state, round=3), result, late)
    assert late == rows[2]


def test_a_score_is_over_examples_and_not_a_mean_of_batches(tmp_path: Path) -> None:
    begun = begin(tmp_path, RECIPE)
    fed = begun.federation
    images = halves().splits["test"].images[:10]
    with torch.no_grad():
        predicted = fed.net(images).argmax(1)
    labels = predicted.clone()
    labels[8:] = (predicted[8:] + 1) % 3  # the second batch, of 2, is all wrong
    task = replace(halves(), splits=dict.fromkeys(("train", "val", "test"), Images(images, labels)))
    assert scores(fed.net, task, "val", batch_size=8).tolist() == [1] * 8 + [0] * 2
    assert score_of(replace(fed, task=task), begun.state.params, "val") == pytest.approx(0.8)


def scored(
    monkeypatch: pytest.MonkeyPatch, values: list[float]
) -> list[tuple[str, dict[str, Tensor]]]:
    """Validation finds these values one after the other, the test 0.5; the split and parameters of each look."""
    looks: list[tuple[str, dict[str, Tensor]]] = []
    left = list(values)
    original = federated_callbacks.score_of

    def score(federation, params, split):
        looks.append((split, {n: t.clone() for n, t in params.items()}))
        original(federation, params, split)
        return left.pop(0) if split == "val" else 0.5

    for module in ("callbacks", "run"):
        monkeypatch.setattr(f"deltafl.federated.{module}.score_of", score)
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
    assert (run.result["best_round"], run.result["val_score"], run.result["test_score"]) == (
        best, values[best], 0.5,
    )  # fmt: skip
    told = [None if math.isnan(v) else v for v in values]
    assert [r["val_score"] for r in run.rows] == told
    saved = load_net(tmp_path / "run" / "model").module.state_dict()
    for name, tensor in looks[best][1].items():
        assert torch.equal(saved[f"encoder.{name}"], tensor)
        assert torch.equal(looks[-1][1][name], tensor)


def test_the_tested_model_is_the_saved_one(tmp_path: Path) -> None:
    recipe = RECIPE.replace(train_head=True, lr=0.3, num_rounds=6)
    run = federate(normed(), halves(), recipe, tmp_path / "run")
    net = load_net(tmp_path / "run" / "model")
    assert run.result["best_round"] > 0
    for split in ("test", "val"):
        assert scores(net, halves(), split).double().mean().item() == run.result[f"{split}_score"]
    assert run.result["val_score"] == max(r["val_score"] for r in run.rows)
    assert run.result["test_examples"] == 31


def test_validation_every_few_rounds_and_after_the_last(tmp_path: Path) -> None:
    recipe = RECIPE.replace(num_rounds=5, eval_every=2)
    run = federate(plain(), halves(), recipe, tmp_path / "run")
    assert [r["round"] for r in run.rows if r["val_score"] is not None] == [0, 2, 4, 5]


def test_patience_counts_validations_without_a_gain(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scored(monkeypatch, [0.1, 0.3, 0.3, 0.4, 0.4, 0.2, 0.9, 0.9])
    recipe = RECIPE.replace(num_rounds=14, eval_every=2, patience=2)
    run = federate(plain(), halves(), recipe, tmp_path / "run")
    assert run.rows[-1]["round"] == run.result["rounds"] == 10
    assert run.result["best_round"] == 6


def test_two_runs_of_one_seed_are_the_same_and_of_two_seeds_are_not(tmp_path: Path) -> None:
    found = {}
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        federate(normed(), halves(), RECIPE.replace(seed=seed), tmp_path / name)
        found[name] = (tmp_path / name / "model" / "model.safetensors").read_bytes()
    assert found["a"] == found["b"] != found["c"]
