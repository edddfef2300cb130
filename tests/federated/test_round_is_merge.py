"""One round is the merge of the clients' checkpoints, bit for bit."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from deltafl.federated import FederatedRecipe
from deltafl.federated.server import ServerState
from deltafl.merge.plan import plan_merge
from deltafl.merge.recipe import MergeRecipe
from deltafl.merge.run import run_merge
from deltafl.models import Net, load_net
from deltafl.rules.building import delta_rules, load_rules
from federated import worlds
from federated.worlds import assert_same, begin, federate, halves, normed, one_round, plain
from laws.worlds import EXAMPLES
from tiny_models import vit_file

RECIPE = worlds.RECIPE.replace(
    num_clients=5, participation_rate=1.0, local_steps=4, local_steps_spread=3.0, num_rounds=1,
    sharding="non_iid", nc=1, server_lr=0.7, seed=2,
)  # fmt: skip


CASES = [
    (name, params)
    for name in delta_rules()
    for params in EXAMPLES.get(name, [load_rules()[name].typical()])
]


def after_one_round(net: Net, recipe: FederatedRecipe, out: Path) -> tuple[ServerState, Path]:
    """The state after the round, and the folder of the clients' checkpoints."""
    federate(net, halves(), recipe, out, save_client_updates=(1,))
    state, _ = one_round(begin(out, recipe, net, halves()))
    return state, out / "updates" / "round-0001"


def clients(folder: Path) -> list[Path]:
    return sorted(folder.glob("client-*"))


def sizes(folder: Path) -> list[int]:
    return [json.loads((c / "training.json").read_text())["num_examples"] for c in clients(folder)]


def merged(folder: Path, recipe: FederatedRecipe, out: Path) -> dict[str, Tensor]:
    server, rule = recipe.server, recipe.server.aggregator
    given = {} if rule == "fedavg" else {"weights": sizes(folder)}
    given |= {"seed": recipe.seed + 1} if rule in ("dare", "della") else {}
    models = [str(c) for c in clients(folder)]
    given |= {"base": str(folder / "base"), "models": models, "method": rule, **server.params}
    run_merge(plan_merge(MergeRecipe.of(server_lr=server.server_lr, **given)), out)
    return files_of(out)


def files_of(model: Path) -> dict[str, Tensor]:
    net = load_net(model)
    return {net.file_name(n): t for n, t in net.module.state_dict().items()}


def assert_is_merge(state: ServerState, tensors: dict[str, Tensor]) -> None:
    assert state.params
    assert_same(dict(state.params), {n: tensors[n] for n in state.params})


@pytest.mark.parametrize(
    ("rule", "params"), CASES, ids=[f"{n}-{i}" for i, (n, _) in enumerate(CASES)]
)
def test_by_every_rule(rule: str, params: dict[str, Any], tmp_path: Path) -> None:
    prox = {"local_algorithm": "fedprox"} if params.get("normalizer") == "prox" else {}
    recipe = RECIPE.replace(aggregator=rule, **params, **prox)
    state, folder = after_one_round(plain(), recipe, tmp_path / "run")
    assert len(set(sizes(folder))) > 1
    found = merged(folder, recipe, tmp_path / "merged")
    assert not torch.equal(found["first.weight"], plain().module.encoder.first.weight)
    assert_is_merge(state, found)


@pytest.mark.parametrize("rule", ["fedavg", "fednova", "cclip", "median", "karcher"])
def test_of_a_transformer_whose_file_lists_its_tensors_otherwise(rule: str, tmp_path: Path) -> None:
    params = {"rho": 0.4, "unit": "quantile"} if rule == "cclip" else {}
    recipe = RECIPE.replace(aggregator=rule, **params)
    net = load_net(vit_file(num_hidden_layers=1))
    state, folder = after_one_round(net, recipe, tmp_path / "run")
    assert_is_merge(state, merged(folder, recipe, tmp_path / "merged"))


@pytest.mark.parametrize("rule", ["cclip", "ties"])
def test_with_a_mask_frozen_coordinates_stay_and_the_rest_is_the_merge(rule: str, tmp_path: Path):
    params = {"cclip": {"rho": 0.02}, "ties": {"density": 0.3}}.get(rule, {})
    recipe = RECIPE.replace(
        aggregator=rule, sparsity_ratio=0.5, mask_strategy="random", weight_decay=0.1, **params
    )
    state, folder = after_one_round(plain(), recipe, tmp_path / "run")
    assert_is_merge(state, merged(folder, recipe, tmp_path / "merged"))
    start = plain().module.encoder.state_dict()
    same = sum(int((state.params[n] == start[n]).sum()) for n in start)
    assert same >= sum(t.numel() for t in start.values()) // 2


def test_running_statistics_are_averaged_and_counters_are_not(tmp_path: Path) -> None:
    state, folder = after_one_round(normed(), RECIPE, tmp_path / "run")
    assert_is_merge(state, merged(folder, RECIPE, tmp_path / "merged"))
    held = [load_file(c / "model.safetensors") for c in clients(folder)]
    share = [n / sum(sizes(folder)) for n in sizes(folder)]
    base = load_file(folder / "base" / "model.safetensors")
    mean = sum(p * h["norm.running_mean"].double() for p, h in zip(share, held, strict=True))
    wanted = base["norm.running_mean"] + 0.7 * (mean - base["norm.running_mean"])
    torch.testing.assert_close(state.params["norm.running_mean"].double(), wanted)
    assert len({h["norm.running_mean"].sum().item() for h in held}) == len(held)
    assert "norm.num_batches_tracked" not in state.params
    final = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert [int(t["norm.num_batches_tracked"]) for t in (base, *held, final)] == [7] * (
        len(held) + 2
    )


def test_running_statistics_are_never_extrapolated(tmp_path: Path) -> None:
    recipe = RECIPE.replace(server_lr=5.0)
    state, folder = after_one_round(normed(), recipe, tmp_path / "run")
    assert_is_merge(state, merged(folder, recipe, tmp_path / "merged"))
    held = [load_file(c / "model.safetensors") for c in clients(folder)]
    share = [n / sum(sizes(folder)) for n in sizes(folder)]
    for name in ("norm.running_mean", "norm.running_var"):
        mean = sum(p * h[name].double() for p, h in zip(share, held, strict=True))
        torch.testing.assert_close(state.params[name].double(), mean, rtol=1e-5, atol=1e-6)


def test_of_a_language_model(tmp_path: Path) -> None:
    net, task = worlds.language()
    recipe = RECIPE.replace(num_clients=4, nc=1, head="ridge", aggregator="fednova", lr=0.3)
    federate(net, task, recipe, tmp_path / "run", save_client_updates=("all",))
    folder = tmp_path / "run" / "updates" / "round-0001"
    found = merged(folder, recipe, tmp_path / "merged")
    assert_same(found, files_of(tmp_path / "run" / "model"))
    assert not torch.equal(load_net(tmp_path / "merged").flat, load_net(folder / "base").flat)


def test_a_rule_that_draws_draws_anew_in_each_round() -> None:
    server = RECIPE.replace(aggregator="dare", drop_rate=0.5).server
    assert server.rule(1) != server.rule(2)
