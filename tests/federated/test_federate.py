"""Whole runs: what is counted, what is chosen, what is refused."""

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from deltafl.algebra.deltas import Update
from deltafl.errors import DeltaflError
from deltafl.federated import FederatedRecipe, LocalTraining, choose_clients, federate, run_round
from deltafl.federated import run as federated_run
from deltafl.federated.ledger import Ledger
from deltafl.models import load_encoder
from deltafl.models.flat import FlatModel
from deltafl.models.heads import load_head
from deltafl.rules.rule import Source
from deltafl.tasks.arrays import Split, Task
from deltafl.training.legacy import predict_correct
from federated.worlds import RECIPE, begin, normed, plain
from tiny_models import tiny_task


def bad_client(broken: set[int], value: float):
    """A user's client: as ours, but some clients' updates hold one value that is not finite."""

    def make(model: FlatModel, head, recipe: FederatedRecipe):
        ours = LocalTraining(model, head, recipe)

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


def lacking(model, head, recipe):
    return lambda params, mask, round: Update(
        {"first.weight": params["first.weight"] * 0}, Source("x", 1, 1)
    )


def untrained(model, head, recipe):
    return lambda params, mask, round: Update(
        {n: torch.zeros_like(t) for n, t in params.items()}, Source("x", 5, 1)
    )


def test_an_update_that_is_not_finite_is_left_out_named_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = replace(
        RECIPE,
        client="federated.test_federate:one_nan",
        aggregator="median",
        server_optimizer="fedadam",
    )
    with caplog.at_level(logging.WARNING):
        run = federate(plain(), tiny_task(), recipe, tmp_path / "run", device="cpu")
    expected = {r: [k for k in choose_clients(recipe, r) if k in (1, 4)] for r in range(1, 5)}
    assert sum(map(len, expected.values())) > 1
    rows = {r["round"]: r for r in run.rows if r["event"] == "round"}
    assert {r: row["failed"] for r, row in rows.items()} == expected
    assert run.result["failed_updates"] == sum(map(len, expected.values()))
    assert sorted(m for m in caplog.messages if "NaN" in m) == sorted(
        f"round {r}: the update of client {k} has NaN or Inf and is left out"
        for r, ks in expected.items()
        for k in ks
    )
    saved = load_encoder(tmp_path / "run" / "model").module.state_dict()
    assert all(t.isfinite().all() for t in saved.values())


def test_the_round_is_that_of_the_others(tmp_path: Path) -> None:
    with_bad = begin(
        tmp_path, replace(RECIPE, participation_rate=1.0, client="federated.test_federate:one_nan")
    )
    told: list[tuple[int, Update]] = []
    state, result = run_round(with_bad.state, with_bad.world, lambda k, u: told.append((k, u)))
    assert [k for k, _ in told] == [0, 2, 3, 5]
    assert result.failed == (1, 4)
    total = sum(u.source.num_examples or 0 for _, u in told)
    mean = sum(u.delta["first.weight"] * ((u.source.num_examples or 0) / total) for _, u in told)
    torch.testing.assert_close(
        state.params["first.weight"], with_bad.state.params["first.weight"] + mean
    )


def test_no_finite_update_at_all_is_an_error(tmp_path: Path) -> None:
    recipe = replace(RECIPE, client="federated.test_federate:all_inf")
    with pytest.raises(
        DeltaflError, match=r"round 1: no client's update is finite \(3 of them\); use a smaller lr"
    ):
        federate(plain(), tiny_task(), recipe, tmp_path / "run", device="cpu")


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
        federate(
            plain(), tiny_task(), replace(RECIPE, client=client), tmp_path / "run", device="cpu"
        )


def test_scaffold_needs_a_client_that_knows_it(tmp_path: Path) -> None:
    recipe = replace(
        RECIPE, local_algorithm="scaffold", momentum=0.0, client="federated.test_federate:untrained"
    )
    with pytest.raises(DeltaflError, match="scaffold needs clients that return their new control"):
        federate(plain(), tiny_task(), recipe, tmp_path / "run", device="cpu")


PARAMETERS = 64 * 12 + 12 + 12 * 5 + 5
HEAD_VALUES = 3 * 5 + 3


def rows_of(
    recipe: FederatedRecipe, tmp_path: Path, encoder=plain
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    run = federate(encoder(), tiny_task(), recipe, tmp_path, device="cpu")
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
    rows, result = rows_of(replace(RECIPE, **changes), tmp_path / "run", encoder)
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
    recipe = replace(RECIPE, sparsity_ratio=0.9, momentum=0.0, local_algorithm=algorithm)
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
        (
            {
                "sparsity_ratio": 0.5,
                "calibration": "progressive",
                "calibration_rounds": 2,
                "attenuate": 0.5,
            },
            6 * 4 * PARAMETERS,
            6 * 4 * HEAD_VALUES + 3 * -(-PARAMETERS // 8),
        ),
    ],
    ids=str,
)
def test_bytes_of_step_zero_are_told_apart(
    changes: dict, up: int, down: int, tmp_path: Path
) -> None:
    run = federate(
        plain(),
        tiny_task(),
        replace(RECIPE, num_rounds=1, **changes),
        tmp_path / "run",
        device="cpu",
    )
    for told in (run.rows[0], run.result):
        assert (told["setup_bytes_up"], told["setup_bytes_down"]) == (up, down)


def test_what_a_client_sends_is_what_the_ledger_counts(tmp_path: Path) -> None:
    begun = begin(tmp_path, replace(RECIPE, sparsity_ratio=0.9, momentum=0.0))
    sent: list[int] = []
    _, result = run_round(
        begun.state, begun.world, lambda k, u: sent.append(u.delta.tuned.num_bytes.values)
    )
    ledger = Ledger(
        begun.setting.recipe, begun.setting.model, begun.setting.head, begun.setting.mask
    )
    assert sum(sent) == ledger.row(1, result, None)["bytes_up"] > 0


def test_rows_of_a_ledger_that_begins_late_are_the_same(tmp_path: Path) -> None:
    begun = begin(tmp_path, replace(RECIPE, sparsity_ratio=0.9))
    _, result = run_round(begun.state, begun.world)
    parts = (begun.setting.recipe, begun.setting.model, begun.setting.head, begun.setting.mask)
    whole, late = Ledger(*parts), Ledger(*parts)
    rows = [whole.row(n, result, None) for n in (1, 2, 3)]
    without = {k: v for k, v in late.row(3, result, None).items() if k != "peak_memory_bytes"}
    assert without == {k: v for k, v in rows[2].items() if k != "peak_memory_bytes"}


def test_accuracy_is_over_examples_and_not_a_mean_of_batches(tmp_path: Path) -> None:
    begun = begin(tmp_path, RECIPE)
    setting = begun.setting
    images = setting.task.test.images[:10]
    with torch.no_grad():
        predicted = setting.head.logits(setting.model.features(images)).argmax(1)
    labels = predicted.clone()
    labels[8:] = (predicted[8:] + 1) % 3  # the second batch, of 2, is all wrong
    split = Split(images, labels)
    correct = predict_correct(setting.model, setting.head, split, batch_size=8)
    assert correct.tolist() == [1] * 8 + [0] * 2
    task = replace(setting.task, val=split)
    assert federated_run._accuracy(begun.state.params, replace(setting, task=task), split) == 0.8


@dataclass(frozen=True)
class Watched(Split):
    """A split that tells when its images are asked for."""

    def __getattribute__(self, name: str) -> Any:
        if name == "images":
            ASKED.append(len(TOLD))
        return super().__getattribute__(name)


ASKED: list[int] = []
TOLD: list[Any] = []


def accuracies(
    monkeypatch: pytest.MonkeyPatch, values: list[float], task: Task
) -> list[dict[str, Tensor]]:
    """Validation finds these values one after the other, the test 0.5; the parameters that were judged."""
    judged: list[dict[str, Tensor]] = []
    left = list(values)

    def score(params, setting, split):
        judged.append({n: t.clone() for n, t in params.items()})
        original(params, setting, split)
        return left.pop(0) if split is task.val else 0.5

    original = federated_run._accuracy
    monkeypatch.setattr(federated_run, "_accuracy", score)
    return judged


@pytest.mark.parametrize(
    ("values", "best"),
    [
        ([0.1, 0.5, 0.3, 0.5, 0.4], 1),
        ([0.6, 0.5, 0.3, 0.5, 0.6], 0),
        ([0.1, 0.2, 0.3, 0.4, 0.5], 4),
    ],
)
def test_the_best_round_is_chosen_on_validation_and_tested_once(
    values: list[float], best: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = tiny_task()
    task = replace(task, test=Watched(task.test.images, task.test.labels))
    judged = accuracies(monkeypatch, values, task)
    ASKED.clear()
    TOLD.clear()
    run = federate(
        plain(), task, RECIPE, tmp_path / "run", device="cpu", on_round=lambda r, n: TOLD.append(r)
    )
    assert len(judged) == 6
    assert set(ASKED) == {5}, "the test split was touched before the last round"
    assert (run.result["best_round"], run.result["val_score"], run.result["test_score"]) == (
        best, max(values), 0.5,
    )  # fmt: skip
    assert [r["val_score"] for r in run.rows] == values
    saved = load_encoder(tmp_path / "run" / "model").module.state_dict()
    for name, tensor in judged[best].items():
        assert torch.equal(saved[name], tensor)
        assert torch.equal(judged[-1][name], tensor)


def test_the_tested_model_is_the_saved_one(tmp_path: Path) -> None:
    recipe = replace(RECIPE, train_head=True, lr=0.3, num_rounds=6)
    task = tiny_task()
    run = federate(normed(), task, recipe, tmp_path / "run", device="cpu")
    model = FlatModel(load_encoder(tmp_path / "run" / "model"))
    head = load_head(tmp_path / "run" / "model" / "head.safetensors")
    assert run.result["best_round"] > 0
    assert (
        predict_correct(model, head, task.test).double().mean().item() == run.result["test_score"]
    )
    assert predict_correct(model, head, task.val).double().mean().item() == run.result["val_score"]
    assert run.result["val_score"] == max(r["val_score"] for r in run.rows)
    assert run.result["test_examples"] == 31


def test_validation_every_few_rounds_and_after_the_last(tmp_path: Path) -> None:
    recipe = replace(RECIPE, num_rounds=5, eval_every=2)
    run = federate(plain(), tiny_task(), recipe, tmp_path / "run", device="cpu")
    assert [r["round"] for r in run.rows if r["val_score"] is not None] == [0, 2, 4, 5]


def test_patience_counts_validations_without_a_gain(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = tiny_task()
    accuracies(monkeypatch, [0.1, 0.3, 0.3, 0.4, 0.4, 0.2, 0.9, 0.9], task)
    recipe = replace(RECIPE, num_rounds=14, eval_every=2, patience=2)
    run = federate(plain(), task, recipe, tmp_path / "run", device="cpu")
    assert run.rows[-1]["round"] == run.result["rounds"] == 10
    assert run.result["best_round"] == 6


def test_two_runs_of_one_seed_are_the_same_and_of_two_seeds_are_not(tmp_path: Path) -> None:
    found = {}
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        federate(normed(), tiny_task(), replace(RECIPE, seed=seed), tmp_path / name, device="cpu")
        found[name] = (tmp_path / name / "model" / "model.safetensors").read_bytes()
    assert found["a"] == found["b"] != found["c"]
