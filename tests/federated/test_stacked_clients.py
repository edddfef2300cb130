"""`--engine vmap`: stacked clients are sequential ones, up to rounding, and what they do not serve is refused."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest
import torch
from torch import Tensor, nn

from deltafl.algebra.aggregate import Update
from deltafl.errors import DeltaflError
from deltafl.federated import (
    ClientUpdate,
    FederatedRecipe,
    LocalTraining,
    Round,
    ServerState,
    federate,
    run_round,
)
from deltafl.federated.client import moving
from deltafl.federated.controls import Controls
from deltafl.federated.rounds import World
from deltafl.federated.stacked import StackedTraining
from deltafl.models.encoder import InputSpec, LoadedEncoder, assemble
from deltafl.models.flat import FlatModel
from tiny_models import Convolution as Net
from tiny_models import tiny_head, tiny_task, tiny_vit

RECIPE = FederatedRecipe(
    num_clients=4,
    participation_rate=0.75,
    local_steps=3,
    num_rounds=3,
    batch_size=6,
    lr=0.05,
    head="linear",
)
SHARDS = (torch.arange(0, 9), torch.arange(9, 25), torch.arange(25, 42), torch.arange(42, 50))


class Mlp(nn.Module):
    """Two layers on an 8 x 8 image; `extra` sits between them."""

    def __init__(self, extra: nn.Module | None = None) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first, self.second = nn.Linear(64, 20), nn.Linear(20, 16)
        self.extra = extra or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.extra(self.first(x.flatten(1)).relu()))


class Noise(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(x, 0.5, training=self.training)


class Counter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.get_buffer("seen").add_(1)
        return x


def mlp(extra: nn.Module | None = None) -> LoadedEncoder:
    return assemble(
        Mlp(extra), lambda module, x: module(x), InputSpec(8, 1, (0.25,), (0.5,)), "mlp"
    )


def net() -> LoadedEncoder:
    return assemble(
        Net(16),
        lambda module, x: cast(Net, module).embed(x),
        InputSpec(8, 1, (0.25,), (0.5,)),
        "net",
    )


def world(encoder: LoadedEncoder, recipe: FederatedRecipe, path: Path) -> tuple[ServerState, World]:
    model, head = FlatModel(encoder), tiny_head()
    kind: type[LocalTraining | StackedTraining] = (
        StackedTraining if recipe.engine == "vmap" else LocalTraining
    )
    params = {n: t.clone() for n, t in moving(model, head).items()}
    client = kind(model, head, recipe)
    split = tiny_task().train
    return ServerState(0, params), World(
        recipe, split, SHARDS, client, None, frozenset(params), Controls(path)
    )


SETTINGS = {
    "plain": {"momentum": 0.0},
    "momentum": {"momentum": 0.9, "weight_decay": 0.01},
    "nesterov": {"momentum": 0.8, "nesterov": True, "weight_decay": 0.1, "lr_schedule": "cosine"},
    "clipped": {"grad_clip": 0.3, "label_smoothing": 0.1},
    "augmented": {"augment": "crop_flip"},
    "unequal": {"local_steps_spread": 3.0, "aggregator": "fednova", "momentum": 0.0},
}


@pytest.mark.parametrize("make", [mlp, tiny_vit])
@pytest.mark.parametrize("setting", SETTINGS)
def test_stacked_rounds_equal_sequential_ones(make, setting, tmp_path):
    sequential = replace(RECIPE, **SETTINGS[setting])
    state, plain = world(make(), sequential, tmp_path)
    start = state.params
    other, stacked = world(make(), replace(sequential, engine="vmap"), tmp_path)
    for _ in range(3):
        state, result = run_round(state, plain)
        other, other_result = run_round(other, stacked)
        assert other_result.clients == result.clients
        assert other_result.num_steps == result.num_steps
        assert other_result.loss == pytest.approx(result.loss, rel=1e-4)
    for name, value in state.params.items():
        moved = (value - start[name]).abs().max()
        assert (value - other.params[name]).abs().max() <= 1e-3 * moved + 1e-6, name
    assert max((v - start[n]).abs().max() for n, v in state.params.items()) > 1e-3


def test_each_update_is_its_own_clients(tmp_path):
    recipe = replace(RECIPE, local_steps_spread=3.0)
    state, stacked = world(mlp(), replace(recipe, engine="vmap"), tmp_path)
    parts = [
        Round(1, k, stacked.split, SHARDS[k], steps, 0.05) for k, steps in ((2, 4), (0, 2), (3, 4))
    ]
    assert isinstance(stacked.client, StackedTraining)
    together = stacked.client.train_all(state.params, None, parts)
    alone = [world(mlp(), recipe, tmp_path)[1].client(state.params, None, part) for part in parts]
    for a, b in zip(together, alone, strict=True):
        assert isinstance(b, ClientUpdate)
        assert a.source == b.source
        assert a.loss == pytest.approx(b.loss, rel=1e-4)
        for name in state.params:
            torch.testing.assert_close(a.delta[name], b.delta[name], rtol=1e-3, atol=1e-6)
    one = stacked.client(state.params, None, parts[1])
    torch.testing.assert_close(
        one.delta["first.weight"], alone[1].delta["first.weight"], rtol=1e-3, atol=1e-6
    )


def test_the_servers_parameters_stay_as_they_are(tmp_path):
    state, stacked = world(mlp(), replace(RECIPE, engine="vmap"), tmp_path)
    before = {n: t.clone() for n, t in state.params.items()}
    run_round(state, stacked)
    assert all(torch.equal(before[n], t) for n, t in state.params.items())


@pytest.mark.parametrize(
    ("what", "changes", "make"),
    [
        ("local_algorithm fedprox", {"local_algorithm": "fedprox"}, mlp),
        ("local_algorithm scaffold", {"local_algorithm": "scaffold", "momentum": 0.0}, mlp),
        ("a mask", {"sparsity_ratio": 0.5}, mlp),
        ("mixed_precision bf16", {"mixed_precision": "bf16"}, mlp),
        ("a client of your own", {"client": "mine:client"}, mlp),
        ('batch norm in training ("norm")', {}, net),
        ('dropout ("extra")', {}, lambda: mlp(nn.Dropout(0.1))),
    ],
)
def test_what_is_not_served_is_refused_with_the_remedy(what, changes, make):
    recipe = replace(RECIPE, engine="vmap", **changes)
    with pytest.raises(DeltaflError) as error:
        StackedTraining(FlatModel(make()), tiny_head(), recipe)
    assert str(error.value) == f"engine vmap does not serve {what}; use engine sequential"


def test_a_trained_head_is_refused():
    with pytest.raises(DeltaflError, match="does not serve train_head; use engine sequential"):
        StackedTraining(FlatModel(mlp()), tiny_head().trainable(), RECIPE)


@pytest.mark.parametrize(("extra", "reason"), [(Noise, "random"), (Counter, "buffer")])
def test_what_only_the_forward_pass_shows_is_refused_too(extra, reason, tmp_path):
    state, stacked = world(mlp(extra()), replace(RECIPE, engine="vmap"), tmp_path)
    with pytest.raises(
        DeltaflError, match=f"cannot run this model.*{reason}.*use engine sequential"
    ):
        run_round(state, stacked)


def test_masks_and_control_variates_are_refused(tmp_path):
    state, stacked = world(mlp(), replace(RECIPE, engine="vmap"), tmp_path)
    part = Round(1, 0, stacked.split, SHARDS[0], 1, 0.1)
    mask = {n: torch.ones_like(t, dtype=torch.bool) for n, t in state.params.items()}
    for given, round in ((mask, part), (None, replace(part, control=torch.zeros(3)))):
        with pytest.raises(DeltaflError, match="neither masks nor control variates"):
            stacked.client(state.params, given, round)


def test_a_round_hands_all_its_clients_to_a_group_client(tmp_path):
    asked: list[list[int]] = []

    class Group:
        def __call__(self, params, mask, round) -> Update:
            raise AssertionError("one client at a time")

        def train_all(self, params, mask, rounds: Sequence[Round]) -> list[Update]:
            asked.append([r.client for r in rounds])
            return [inner(params, mask, r) for r in rounds]

    state, plain = world(mlp(), RECIPE, tmp_path)
    inner = plain.client
    grouped, result = run_round(state, replace(plain, client=Group()))
    assert asked == [list(result.clients)]
    alone, _ = run_round(state, plain)
    assert all(torch.equal(t, alone.params[n]) for n, t in grouped.params.items())


def test_the_engine_is_part_of_the_recipe_and_of_the_run(tmp_path):
    assert (
        'unknown engine "vmapp"; did you mean "vmap"?' in FederatedRecipe(engine="vmapp").problems()
    )
    recipe = replace(RECIPE, num_rounds=2, head="ridge")
    runs = {
        engine: federate(
            tiny_vit(), tiny_task(), replace(recipe, engine=engine), tmp_path / engine, device="cpu"
        )
        for engine in ("sequential", "vmap")
    }
    assert runs["vmap"].result["config"]["engine"] == "vmap"
    losses = {engine: [row.get("loss") for row in run.rows[1:]] for engine, run in runs.items()}
    assert losses["vmap"] == pytest.approx(losses["sequential"], rel=1e-4)
