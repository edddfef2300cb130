from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from deltafl.algebra.deltas import Update
from deltafl.errors import DeltaflError
from deltafl.federated import FederatedRecipe, ServerState, choose_clients, federate, run_round
from deltafl.federated.recipe import SERVER_OPTIMIZERS
from deltafl.federated.rounds import aggregate
from deltafl.federated.server import round_lr, server_step, steps_of
from deltafl.rules.rule import Source
from federated.worlds import RECIPE, begin, normed, plain
from tiny_models import tiny_task


def reference(recipe: FederatedRecipe, theta: np.ndarray, deltas: list[np.ndarray]) -> np.ndarray:
    """Algorithm 2 of arXiv 2003.00295 in float64; without an adaptive rate, heavy ball."""
    b1, b2, tau, lr = (
        recipe.server_momentum,
        recipe.server_beta2,
        recipe.server_tau,
        recipe.server_lr,
    )
    b1 = b1 if b1 is not None else (0.0 if recipe.server_optimizer == "sgd" else 0.9)
    m, v = np.zeros_like(theta), np.full_like(theta, tau**2)
    for d in deltas:
        if recipe.server_optimizer == "sgd":
            m = b1 * m + d
            theta = theta + lr * m
            continue
        m = b1 * m + (1 - b1) * d
        v = {
            "fedadagrad": v + d**2,
            "fedyogi": v - (1 - b2) * d**2 * np.sign(v - d**2),
            "fedadam": b2 * v + (1 - b2) * d**2,
        }[recipe.server_optimizer]
        theta = theta + lr * m / (np.sqrt(v) + tau)
    return theta


@pytest.mark.parametrize("momentum", [None, 0.0, 0.7])
@pytest.mark.parametrize("optimizer", SERVER_OPTIMIZERS)
def test_three_steps_are_the_formula(optimizer: str, momentum: float | None) -> None:
    recipe = FederatedRecipe(
        server_optimizer=optimizer,
        server_momentum=momentum,
        server_lr=0.3,
        server_beta2=0.9,
        server_tau=0.01,
    )
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
        state = server_step(state, aggregate(updates, recipe), recipe, {"w"})
    means = [(a.double() + 3 * b.double()).numpy() / 4 for a, b in deltas]
    wanted = reference(recipe, start["w"].double().numpy(), means)
    np.testing.assert_allclose(state.params["w"].double().numpy(), wanted, rtol=2e-5, atol=2e-6)
    plain = optimizer == "sgd" and not momentum
    np.testing.assert_allclose(  # running statistics are no gradients: they have no moments
        state.params["running"].double().numpy(),
        (0.3 if plain else 1.0) * sum(means),
        rtol=2e-5,
        atol=2e-6,
    )
    assert torch.equal(start["running"], torch.zeros(40))


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("optimizer", SERVER_OPTIMIZERS)
def test_frozen_coordinates_never_move(optimizer: str, nesterov: bool, tmp_path: Path) -> None:
    recipe = replace(
        RECIPE, server_optimizer=optimizer, server_momentum=0.9, server_lr=0.1, momentum=0.9, nesterov=nesterov,
        weight_decay=0.1, sparsity_ratio=0.7, mask_strategy="random", train_head=True,
    )  # fmt: skip
    begun = begin(tmp_path, recipe)
    state, mask = begun.state, begun.setting.mask
    assert mask is not None
    for _ in range(4):
        state, _ = run_round(state, begun.world)
    for name, kept in mask.items():
        assert torch.equal(state.params[name][~kept], begun.state.params[name][~kept]), name
        assert kept.any()
        assert (state.params[name][kept] != begun.state.params[name][kept]).any(), name
    assert not torch.equal(
        state.params["deltafl_head.weight"], begun.state.params["deltafl_head.weight"]
    )


def test_a_round_changes_nothing_in_the_state_it_starts_from(tmp_path: Path) -> None:
    begun = begin(tmp_path, replace(RECIPE, server_optimizer="fedadam"), normed())
    first, _ = run_round(begun.state, begun.world)
    before = {
        part: {n: t.clone() for n, t in getattr(first, part).items()}
        for part in ("params", "m", "v")
    }
    second, _ = run_round(first, begun.world)
    assert not torch.equal(second.params["first.weight"], first.params["first.weight"])
    for part, held in before.items():
        assert all(torch.equal(getattr(first, part)[n], t) for n, t in held.items())
    again, _ = run_round(first, begun.world)
    assert all(torch.equal(again.params[n], t) for n, t in second.params.items())


def test_clients_are_a_function_of_seed_and_round() -> None:
    recipe = FederatedRecipe(num_clients=50, participation_rate=0.2)
    chosen = [choose_clients(recipe, r) for r in range(1, 41)]
    assert chosen == [choose_clients(recipe, r) for r in range(1, 41)]
    assert all(len(set(c)) == 10 and c == sorted(c) and set(c) <= set(range(50)) for c in chosen)
    assert len({tuple(c) for c in chosen}) == 40
    other = [choose_clients(replace(recipe, seed=1), r) for r in range(1, 41)]
    assert all(a != b for a, b in zip(chosen, other, strict=True))
    assert {k for c in chosen for k in c} == set(range(50))
    unlike = replace(
        recipe,
        lr=1.0,
        local_steps=9,
        aggregator="median",
        server_optimizer="fedadam",
        train_head=True,
    )
    assert chosen == [choose_clients(unlike, r) for r in range(1, 41)]


@pytest.mark.parametrize(
    ("clients", "rate", "count"), [(10, 1.0, 10), (7, 0.5, 4), (100, 0.1, 10), (3, 0.34, 1)]
)
def test_as_many_clients_as_asked_for(clients: int, rate: float, count: int) -> None:
    recipe = FederatedRecipe(num_clients=clients, participation_rate=rate)
    assert len(choose_clients(recipe, 1)) == count
    assert not recipe.problems()


def test_local_steps_are_a_clients_own() -> None:
    recipe = FederatedRecipe(num_clients=60, local_steps=12, local_steps_spread=3.0)
    steps = [steps_of(recipe, k) for k in range(60)]
    assert 4 <= min(steps) < 6
    assert 24 < max(steps) <= 36
    assert 9 < np.exp(np.mean(np.log(steps))) < 16
    assert steps == [steps_of(replace(recipe, num_clients=90, lr=1.0), k) for k in range(60)]
    assert steps != [steps_of(replace(recipe, seed=1), k) for k in range(60)]
    assert {steps_of(replace(recipe, local_steps_spread=1.0), k) for k in range(60)} == {12}
    assert min(steps_of(replace(recipe, local_steps=1), k) for k in range(60)) == 1


def test_every_client_takes_its_steps(tmp_path: Path) -> None:
    recipe = replace(RECIPE, local_steps_spread=2.5, participation_rate=1.0)
    begun = begin(tmp_path, recipe)
    told: dict[int, Source] = {}
    _, result = run_round(
        begun.state, begun.world, lambda k, update: told.update({k: update.source})
    )
    assert {k: s.num_steps for k, s in told.items()} == {k: steps_of(recipe, k) for k in range(6)}
    assert {k: s.num_examples for k, s in told.items()} == {
        k: len(begun.setting.shards[k]) for k in range(6)
    }
    assert result.num_steps == sum(steps_of(recipe, k) for k in range(6))


def test_the_learning_rate_falls_over_rounds() -> None:
    recipe = FederatedRecipe(num_rounds=10, lr=2.0, lr_schedule="cosine")
    rates = [round_lr(recipe, r) for r in range(1, 11)]
    np.testing.assert_allclose(rates, [1 + np.cos(np.pi * r / 10) for r in range(10)])
    assert {round_lr(replace(recipe, lr_schedule="constant"), r) for r in range(1, 11)} == {2.0}


GOOD = FederatedRecipe(num_clients=10, participation_rate=0.5)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"participation_rate": 0.0}, "participation_rate must be in (0, 1], not 0.0"),
        ({"participation_rate": 1.5}, "participation_rate must be in (0, 1], not 1.5"),
        ({"participation_rate": 0.04}, "selects no client; take at least 0.1"),
        ({"local_steps": 0}, "local_steps must be"),
        ({"local_steps_spread": 0.5}, "local_steps_spread is a factor from 1"),
        ({"num_rounds": 0}, "num_rounds must be"),
        ({"batch_size": 0}, "batch_size must be"),
        ({"lr": 0.0}, "lr must be positive"),
        ({"momentum": 1.0}, "momentum must be in [0, 1)"),
        ({"nesterov": True, "momentum": 0.0}, "nesterov needs a momentum"),
        ({"weight_decay": -0.1}, "weight_decay must be"),
        ({"grad_clip": 0.0}, "grad_clip must be positive"),
        ({"label_smoothing": 1.0}, "label_smoothing must be"),
        ({"prox_mu": -1.0}, "prox_mu must be"),
        ({"local_algorithm": "scaffold"}, "set momentum and weight_decay to 0"),
        ({"sharding": "non_iid"}, "needs nc"),
        ({"sharding": "dirichlet"}, "needs alpha"),
        ({"server_lr": 0.0}, "server_lr must be positive"),
        ({"server_momentum": 1.0}, "server_momentum must be"),
        ({"server_beta2": 1.0}, "server_beta2 must be"),
        ({"server_tau": 0.0}, "server_tau must be"),
        ({"head": "probe", "few_shot": 3}, "few_shot is about the ridge head"),
        ({"sparsity_ratio": 1.0}, "sparsity_ratio must be in [0, 1)"),
        ({"sparsity_ratio": -0.1}, "sparsity_ratio must be in [0, 1)"),
        ({"calibration_rounds": 0}, "calibration_rounds must be"),
        ({"calibration_examples": 0}, "calibration_examples must be"),
        ({"fisher_draws": 0}, "fisher_draws must be"),
        ({"eval_every": 0}, "eval_every must be"),
        ({"patience": 0}, "patience must be"),
        ({"lr_schedule": "cosin"}, 'unknown lr_schedule "cosin"; did you mean "cosine"'),
        ({"augment": "flop"}, 'unknown augment "flop"; did you mean "flip"'),
        ({"local_algorithm": "scafold"}, 'did you mean "scaffold"'),
        ({"sharding": "idd"}, 'did you mean "iid"'),
        ({"client_weights": "uniforme"}, 'did you mean "uniform"'),
        ({"server_optimizer": "fedadm"}, 'did you mean "fedadam"'),
        ({"mask_strategy": "least_sensitiv"}, 'did you mean "least_sensitive"'),
        ({"mask_scope": "globl"}, 'did you mean "global"'),
        ({"calibration": "averag"}, 'did you mean "average"'),
        ({"fisher_labels": "sample"}, 'did you mean "sampled"'),
        ({"sparsity_ratio": 0.5, "mask_file": "mask"}, "give one of them"),
        ({"mixed_precision": "fp8"}, 'unknown mixed_precision "fp8"'),
        ({"aggregator": "fedavgg"}, 'did you mean "fedavg"'),
        ({"aggregator": "cclip"}, "method cclip needs --rho"),
        ({"aggregator_params": {"rho": 1}}, 'method fedavg has no parameter "rho"'),
    ],
    ids=str,
)  # fmt: skip
def test_a_wrong_value_is_one_line(changes: dict, words: str) -> None:
    assert GOOD.problems() == []
    found = replace(GOOD, **changes).problems()
    assert len(found) == 1, found
    assert words in found[0]
    assert "\n" not in found[0]


def test_all_wrong_values_are_told_at_once() -> None:
    assert len(replace(GOOD, lr=-1.0, batch_size=0, aggregator="no").problems()) == 3
    assert replace(GOOD, num_clients=0).problems() == [
        "num_clients: must be greater than or equal to 1, not 0"
    ]
    many = replace(
        GOOD,
        num_clients=4,
        participation_rate=0.5,
        sparsity_ratio=0.5,
        calibration_rounds=3,
    )
    assert len(many.problems()) == 1


def test_weights_are_examples_or_none() -> None:
    updates = [
        Update({"w": torch.full((3,), float(i))}, Source(str(i), num_examples=1 + i))
        for i in range(3)
    ]
    mean = {w: aggregate(updates, replace(GOOD, client_weights=w, aggregator="task_arithmetic"))["w"][0].item()
            for w in ("examples", "uniform")}  # fmt: skip
    assert mean == {"examples": pytest.approx((0 * 1 + 1 * 2 + 2 * 3) / 6), "uniform": 1.0}
    assert aggregate(updates, GOOD)["w"][0].item() == pytest.approx(
        8 / 6
    )  # fedavg's own weights, not squared


def test_a_rule_that_refuses_ends_the_run(tmp_path: Path) -> None:
    begun = begin(
        tmp_path, replace(RECIPE, aggregator="krum", aggregator_params={"num_byzantine": 2})
    )
    with pytest.raises(DeltaflError, match="needs at least 2f \\+ 3 = 7 models"):
        run_round(begun.state, begun.world)


def test_a_rule_that_must_refuse_says_so_before_step_zero(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deltafl.federated.run.set_up", None)
    recipe = replace(RECIPE, aggregator="krum", aggregator_params={"num_byzantine": 1})
    with pytest.raises(DeltaflError, match=r"3 models .* needs at least 2f \+ 3 = 5 models"):
        federate(plain(), tiny_task(), recipe, tmp_path / "run", device="cpu")
    assert not (tmp_path / "run").exists()
