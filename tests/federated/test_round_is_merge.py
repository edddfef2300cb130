"""One round is the merge of the clients' checkpoints, bit for bit."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from checkpoint_files import cli
from deltafl.federated import FederatedRecipe, ServerState, federate
from deltafl.federated import run as federated_run
from deltafl.merge.plan import plan_merge
from deltafl.merge.recipe import MergeRecipe
from deltafl.merge.run import run_merge
from deltafl.models import LoadedEncoder, load_encoder
from deltafl.rules.rule import load_rules
from federated.worlds import assert_same, normed, plain
from laws.worlds import EXAMPLES
from tiny_models import tiny_task, vit_file

RECIPE = FederatedRecipe(
    num_clients=5, participation_rate=1.0, local_steps=4, local_steps_spread=3.0, num_rounds=1, batch_size=4, lr=0.05,
    momentum=0.9, head="linear", sharding="non_iid", nc=1, server_lr=0.7, seed=2,
)  # fmt: skip


CASES = [
    (name, params)
    for name in load_rules()
    for params in EXAMPLES.get(name, [load_rules()[name].typical()])
]


def after_one_round(
    encoder: LoadedEncoder, recipe: FederatedRecipe, out: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[ServerState, Path]:
    """The state after the round, and the folder of the clients' checkpoints."""
    states: list[ServerState] = []
    original = federated_run.run_round

    def recorded(*arguments):
        state, result = original(*arguments)
        states.append(state)
        return state, result

    monkeypatch.setattr(federated_run, "run_round", recorded)
    federate(encoder, tiny_task(), recipe, out, save_client_updates={1}, device="cpu")
    return states[-1], out / "updates" / "round-0001"


def clients(folder: Path) -> list[Path]:
    return [folder / f"client-{k}" for k in range(RECIPE.num_clients)]


def sizes(folder: Path) -> list[int]:
    return [json.loads((c / "training.json").read_text())["num_examples"] for c in clients(folder)]


def merged(
    folder: Path, recipe: FederatedRecipe, params: dict[str, Any], out: Path
) -> dict[str, torch.Tensor]:
    merge = MergeRecipe.of(
        base=str(folder / "base"),
        models=[str(c) for c in clients(folder)],
        method=recipe.aggregator,
        server_lr=recipe.server_lr,
        weights=None if recipe.aggregator == "fedavg" else sizes(folder),
        **params,
    )
    run_merge(plan_merge(merge), out)
    return load_encoder(out).module.state_dict()


def assert_is_merge(state: ServerState, module: dict[str, torch.Tensor]) -> None:
    assert state.params
    assert_same(dict(state.params), {n: module[n] for n in state.params})


@pytest.mark.parametrize(
    ("rule", "params"), CASES, ids=[f"{n}-{i}" for i, (n, _) in enumerate(CASES)]
)
def test_by_every_rule(
    rule: str, params: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prox = {"local_algorithm": "fedprox"} if params.get("normalizer") == "prox" else {}
    recipe = replace(RECIPE, aggregator=rule, aggregator_params=params, **prox)
    state, folder = after_one_round(plain(), recipe, tmp_path / "run", monkeypatch)
    assert len(set(sizes(folder))) > 1
    found = merged(folder, recipe, params, tmp_path / "merged")
    assert not torch.equal(found["first.weight"], plain().module.first.weight)
    assert_is_merge(state, found)


@pytest.mark.parametrize("rule", ["task_arithmetic", "fedavg", "fednova", "cclip", "median"])
def test_of_a_transformer_whose_file_lists_its_tensors_otherwise(
    rule: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = {"rho": 0.4, "unit": "quantile"} if rule == "cclip" else {}
    recipe = replace(RECIPE, aggregator=rule, aggregator_params=params)
    encoder = load_encoder(vit_file(num_hidden_layers=1))
    state, folder = after_one_round(encoder, recipe, tmp_path / "run", monkeypatch)
    assert_is_merge(state, merged(folder, recipe, params, tmp_path / "merged"))


@pytest.mark.parametrize("rule", ["fedavg", "cclip", "trimmed_mean", "ties"])
def test_with_a_mask_frozen_coordinates_stay_and_the_rest_is_the_merge(
    rule: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = {"cclip": {"rho": 0.02}, "ties": {"density": 0.3}}.get(rule, {})
    recipe = replace(
        RECIPE,
        aggregator=rule,
        aggregator_params=params,
        sparsity_ratio=0.5,
        mask_strategy="random",
        weight_decay=0.1,
    )
    state, folder = after_one_round(plain(), recipe, tmp_path / "run", monkeypatch)
    assert_is_merge(state, merged(folder, recipe, params, tmp_path / "merged"))
    start = plain().module.state_dict()
    same = sum(int((state.params[n] == start[n]).sum()) for n in start)
    assert same >= sum(t.numel() for t in start.values()) // 2


def test_running_statistics_are_averaged_and_counters_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state, folder = after_one_round(normed(), RECIPE, tmp_path / "run", monkeypatch)
    assert_is_merge(state, merged(folder, RECIPE, {}, tmp_path / "merged"))
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


def test_through_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for rule, extra in (("fedavg", []), ("cclip", ["--rho", "0.5", "--unit", "quantile"])):
        recipe = replace(
            RECIPE,
            aggregator=rule,
            aggregator_params={"rho": 0.5, "unit": "quantile"} if extra else {},
        )
        state, folder = after_one_round(plain(), recipe, tmp_path / rule, monkeypatch)
        weights = ["--weights", *map(str, sizes(folder))] if extra else []
        out = tmp_path / f"{rule}-merged"
        arguments = [
            "--base",
            folder / "base",
            "--models",
            *clients(folder),
            "--method",
            rule,
            "--server-lr",
            "0.7",
        ]
        assert cli("merge", *arguments, *weights, *extra, "--out", out, "--quiet").code == 0
        assert_is_merge(state, load_encoder(out).module.state_dict())


def test_a_rule_that_draws_draws_anew_in_each_round(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = replace(RECIPE, aggregator="dare", aggregator_params={"drop_rate": 0.5})
    state, folder = after_one_round(plain(), recipe, tmp_path / "run", monkeypatch)
    params = {"drop_rate": 0.5, "seed": recipe.seed + 1}
    assert_is_merge(state, merged(folder, recipe, params, tmp_path / "merged"))
    assert recipe.rule(1) != recipe.rule(2)
