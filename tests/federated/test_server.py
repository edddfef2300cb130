"""The server: its step, whom it asks, its schedule, and what its recipe refuses."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from checkpoint_files import fails
from deltafl.algebra.deltas import Update
from deltafl.errors import DeltaflError
from deltafl.federated import FederatedRecipe
from deltafl.federated.rounds import Workers, combined, run_round
from deltafl.federated.server import SERVER_OPTIMIZERS, ServerRecipe, ServerState, server_step
from deltafl.recipes import read_recipe
from deltafl.rules.rule import Source
from federated.worlds import RECIPE, begin, federate, halves, normed, one_round, plain


def recipe_of(**settings: Any) -> FederatedRecipe:
    return FederatedRecipe.of(model="m", data="d", **settings)


def reference(recipe: ServerRecipe, theta: np.ndarray, deltas: list[np.ndarray]) -> np.ndarray:
    """Algorithm 2 of arXiv 2003.00295 in float64; without an adaptive rate, heavy ball."""
    b1, b2, tau = recipe.server_momentum, recipe.server_beta2, recipe.server_tau
    lr, kind = recipe.server_lr, recipe.server_optimizer
    b1 = b1 if b1 is not None else (0.0 if kind == "sgd" else 0.9)
    m, v = np.zeros_like(theta), np.full_like(theta, tau**2)
    for d in deltas:
        if kind == "sgd":
            m = b1 * m + d
            theta = theta + lr * m
            continue
        m = b1 * m + (1 - b1) * d
        v = {
            "fedadagrad": v + d**2,
            "fedyogi": v - (1 - b2) * d**2 * np.sign(v - d**2),
            "fedadam": b2 * v + (1 - b2) * d**2,
        }[kind]
        theta = theta + lr * m / (np.sqrt(v) + tau)
    return theta


@pytest.mark.parametrize("momentum", [None, 0.0, 0.7])
@pytest.mark.parametrize("optimizer", SERVER_OPTIMIZERS)
def test_three_steps_are_the_formula(optimizer: str, momentum: float | None) -> None:
    recipe = recipe_of(
        server_optimizer=optimizer, server_momentum=momentum, server_lr=0.3, server_beta2=0.9, server_tau=0.01
    )  # fmt: skip
    draw = torch.Generator().manual_seed(0)
    # from far below tau to far above it, so that yogi's sign takes both values
    size = torch.logspace(-4, 1, 40)
    deltas = [[torch.randn(40, generator=draw) * size for _ in range(2)] for _ in range(3)]
    start = {"w": torch.randn(40, generator=draw), "running": torch.zeros(40)}
    state = ServerState(0, start)
    for pair in deltas:
        updates = [
            Update({"w": d, "running": d}, Source(str(i), num_examples=1 + 2 * i))
            for i, d in enumerate(pair)
        ]
        state = server_step(state, combined(updates, recipe, state), recipe.server, {"w"})
    means = [(a.double() + 3 * b.double()).numpy() / 4 for a, b in deltas]
    wanted = reference(recipe.server, start["w"].double().numpy(), means)
    np.testing.assert_allclose(state.params["w"].double(), wanted, rtol=2e-5, atol=2e-6)
    # running statistics are no gradients: they have no moments
    moved = (0.3 if optimizer == "sgd" and not momentum else 1.0) * sum(means)
    np.testing.assert_allclose(state.params["running"].double(), moved, rtol=2e-5, atol=2e-6)
    assert torch.equal(start["running"], torch.zeros(40))


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("optimizer", SERVER_OPTIMIZERS)
def test_frozen_coordinates_never_move(optimizer: str, nesterov: bool, tmp_path: Path) -> None:
    recipe = RECIPE.replace(
        server_optimizer=optimizer, server_momentum=0.9, server_lr=0.1, momentum=0.9, nesterov=nesterov,
        weight_decay=0.1, sparsity_ratio=0.7, mask_strategy="random", train_head=True,
    )  # fmt: skip
    begun = begin(tmp_path, recipe)
    state, mask, start = begun.state, begun.federation.mask, begun.state.params
    assert mask is not None
    with Workers(begun.federation, state) as workers:
        for _ in range(4):
            state, _ = run_round(state, begun.federation, workers)
    for name, kept in mask.items():
        file = name.removeprefix("encoder.")
        assert torch.equal(state.params[file][~kept], start[file][~kept]), name
        assert (state.params[file][kept] != start[file][kept]).any(), name
    assert mask["head.weight"].all()


def test_a_round_changes_nothing_in_the_state_it_starts_from(tmp_path: Path) -> None:
    begun = begin(tmp_path, RECIPE.replace(server_optimizer="fedadam"), normed())
    workers = Workers(begun.federation, begun.state)
    first, _ = run_round(begun.state, begun.federation, workers)
    parts = first.params, first.m, first.v
    before = [{n: t.clone() for n, t in part.items()} for part in parts]
    second, _ = run_round(first, begun.federation, workers)
    assert not torch.equal(second.params["first.weight"], first.params["first.weight"])
    for part, held in zip(parts, before, strict=True):
        assert all(torch.equal(part[n], t) for n, t in held.items())
    again, _ = run_round(first, begun.federation, workers)
    assert all(torch.equal(again.params[n], t) for n, t in second.params.items())


def test_clients_are_a_function_of_seed_and_round() -> None:
    recipe = recipe_of(num_clients=50, participation_rate=0.2)
    chosen = [recipe.clients_in(r) for r in range(1, 41)]
    assert all(len(set(c)) == 10 and c == sorted(c) and set(c) <= set(range(50)) for c in chosen)
    assert len({tuple(c) for c in chosen}) == 40
    assert {k for c in chosen for k in c} == set(range(50))
    other = [recipe.replace(seed=1).clients_in(r) for r in range(1, 41)]
    assert all(a != b for a, b in zip(chosen, other, strict=True))
    unlike = recipe.replace(lr=1.0, local_steps=9, aggregator="median", train_head=True)
    assert chosen == [unlike.clients_in(r) for r in range(1, 41)]
    for clients, rate, count in ((10, 1.0, 10), (7, 0.5, 4), (100, 0.1, 10), (3, 0.34, 1)):
        recipe = recipe_of(num_clients=clients, participation_rate=rate)
        assert len(recipe.clients_in(1)) == count


def test_local_steps_are_a_clients_own(tmp_path: Path) -> None:
    recipe = recipe_of(num_clients=60, local_steps=12, local_steps_spread=3.0)

    def steps(**changes: Any) -> list[int]:
        return [recipe.replace(**changes).steps_of(k) for k in range(60)]

    assert 4 <= min(steps()) < 6
    assert 24 < max(steps()) <= 36
    assert 9 < np.exp(np.mean(np.log(steps()))) < 16
    assert steps() == steps(num_clients=90, lr=1.0) != steps(seed=1)
    assert set(steps(local_steps_spread=1.0)) == {12}
    assert min(steps(local_steps=1)) == 1
    recipe = RECIPE.replace(local_steps_spread=2.5, participation_rate=1.0)
    begun = begin(tmp_path, recipe)
    _, result = one_round(begun)
    for k, update in result.updates.items():
        told = update.source.num_steps, update.source.num_examples
        assert told == (recipe.steps_of(k), len(begun.federation.shards[k]))
    assert result.numbers["num_steps"] == sum(recipe.steps_of(k) for k in range(6))


def test_the_learning_rate_falls_over_rounds() -> None:
    recipe = recipe_of(num_rounds=10, lr=2.0, lr_schedule="cosine")
    rates = [recipe.lr_in(r) for r in range(1, 11)]
    np.testing.assert_allclose(rates, [1 + np.cos(np.pi * r / 10) for r in range(10)])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"participation_rate": 1.5}, "participation_rate: must be less than or equal to 1, not 1.5"),
        ({"participation_rate": 0.04}, "selects no client; take at least 0.1"),
        ({"nesterov": True, "momentum": 0.0}, "local: nesterov needs a momentum"),
        ({"local_algorithm": "scaffold"}, "set momentum and weight_decay to 0"),
        ({"head": "probe", "few_shot": 3}, "few_shot is about the ridge head"),
        ({"num_rounds": 3, "save_client_updates": (2, "4")}, "save_client_updates: 4; name rounds from 1 to 3"),
        ({"lr_schedule": "cosin"}, 'local.lr_schedule: unknown "cosin"; did you mean "cosine"'),
        ({"local_algorithm": "scafold"}, 'did you mean "scaffold"'),
        ({"server_optimizer": "fedadm"}, 'server.server_optimizer: unknown "fedadm"; did you mean "fedadam"'),
        ({"mask_strategy": "least_sensitiv"}, 'did you mean "least_sensitive"'),
        ({"sparsity_ratio": 0.5, "calibration_rounds": 3}, "3 calibration rounds of 5 fresh clients each need more"),
        ({"aggregator": "fedavgg"}, 'did you mean "fedavg"'),
        ({"aggregator": "cclip"}, "method cclip needs --rho"),
        ({"rho": 1.0}, 'method fedavg has no parameter "rho"'),
        ({"lr": -1.0, "batch_size": 0, "aggregator": "no"}, "local.lr: must be greater than 0, not -1.0"),
    ],
    ids=str,
)  # fmt: skip
def test_wrong_values_are_one_line_each_at_once(changes: dict, words: str) -> None:
    with pytest.raises(DeltaflError) as error:
        recipe_of(num_clients=10, participation_rate=0.5).replace(**changes)
    assert len(error.value.problems) == (3 if "batch_size" in changes else 1)
    assert words in str(error.value)


MOVED = {
    "sharding": {"nc": 3}, "local": {"lr": 0.1}, "server": {"server_lr": 0.1}, "data": {"augment": "flip"},
    "sparse": {"sparsity_ratio": 0.5}, "head": {"train_head": True},
}  # fmt: skip
GONE = {"engine": "vmap", "dirichlet_form": "hsu", "aggregator_params": {"rho": 1.0}}


def test_an_old_key_is_told_its_new_place() -> None:
    lines = {next(iter(old)): f'is now "{new}.' for new, old in MOVED.items()}
    given = {"model": "m", "data": "d"} | GONE
    for old in MOVED.values():
        given |= old
    with pytest.raises(DeltaflError) as error:
        read_recipe(FederatedRecipe, given)
    told = [p for p in error.value.problems if re.match('"[a-z_]+"(:| is)', p)]
    wanted = [f'"{old}" {line}{old}"' for old, line in lines.items()]
    wanted += [f'"{old}": is gone' for old in GONE]
    assert all(any(p.startswith(line) for p in told) for line in wanted), told


def test_weights_are_examples_or_none() -> None:
    deltas = [{"w": torch.full((3,), float(i))} for i in range(3)]
    updates = [Update(d, Source(str(i), num_examples=1 + i)) for i, d in enumerate(deltas)]

    def mean(**settings: Any) -> float:
        return combined(updates, recipe_of(**settings), ServerState(0, {}))["w"][0].item()

    assert mean(aggregator="task_arithmetic") == pytest.approx((0 * 1 + 1 * 2 + 2 * 3) / 6)
    assert mean(aggregator="task_arithmetic", client_weights="uniform") == 1.0
    assert mean() == pytest.approx(8 / 6)  # fedavg's own weights, not squared


def test_a_rule_that_refuses_ends_the_run_before_step_zero_where_that_is_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = begin(tmp_path, RECIPE.replace(aggregator="krum", num_byzantine=2))
    fails("needs at least 2f \\+ 3 = 7 models", one_round, begun)
    monkeypatch.setattr("deltafl.federated.run.begin", None)
    recipe = RECIPE.replace(aggregator="krum", num_byzantine=1)
    with pytest.raises(DeltaflError, match=r"3 models .* needs at least 2f \+ 3 = 5 models"):
        federate(plain(), halves(), recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()
