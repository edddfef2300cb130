"""Federations of a LoRA: what the server makes of products, against dense matrices and plain means."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from deltafl.algebra.aggregate import Aggregate
from deltafl.algebra.deltas import Update
from deltafl.errors import DeltaflError
from deltafl.federated import FederatedRecipe, federate
from deltafl.federated.client import LocalTraining, state_of
from deltafl.federated.lora import as_products, lora_step
from deltafl.federated.rounds import Workers, run_round
from deltafl.federated.setup import begin, make_shards
from deltafl.models import load_net
from deltafl.rules.rule import Source
from deltafl.rules.task_arithmetic import TaskArithmetic
from deltafl.tasks import load_task
from deltafl.training import evaluate
from merge.test_search_run import tune_on_lines

DOWN = ["residual", "svd", "frozen_a"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tune_on_lines(tmp_path_factory.mktemp("lora"))


def recipe_of(root: Path, out: Path, **changes: object) -> FederatedRecipe:
    settings = {
        "model": str(root / "base"), "data": str(root / "sums"), "out": str(out), "num_clients": 4,
        "participation_rate": 0.75,
        "client_weights": "uniform", "num_rounds": 3, "local_steps": 3, "batch_size": 4, "lr": 0.5,
        "lora_rank": 2, "workers": 1, "device": "cpu",
    }  # fmt: skip
    return FederatedRecipe.of(**settings | changes)


def started(recipe: FederatedRecipe):
    net = load_net(recipe.model)
    task = load_task(recipe.data, net.inputs, 0)
    return begin(net, task, recipe, make_shards(task, recipe), begun=False)


@pytest.mark.parametrize("rule", ["fedavg", "median"])
@pytest.mark.parametrize("down", DOWN)
def test_a_round_is_the_rule_on_whole_products_and_the_best_lora_of_it(root, tmp_path, down, rule):
    """Reference: each client's whole weights W + s B A, numpy's mean or median, numpy's SVD."""
    recipe = recipe_of(root, tmp_path / "out", lora_down=down, aggregator=rule)
    federation = started(recipe)
    net, client = federation.net, federation.client
    assert isinstance(client, LocalTraining)
    state, original = federation.initial_state(), load_net(recipe.model).module.state_dict()
    layer, held = "model.layers.1.mlp.up_proj", net.module.state_dict()
    origin = original[f"{layer}.weight"].double()

    def whole() -> torch.Tensor:
        """The weight that the net computes with."""
        a, b, w = (
            held[f"{layer}.{p}.weight"].double()
            for p in ("lora_A.default", "lora_B.default", "base_layer")
        )
        return w + 2 * b @ a  # alpha is twice the rank

    with Workers(federation, state) as workers:
        for _ in range(2):
            seen = []
            for k in recipe.clients_in(state.round + 1):
                workers._state = state
                workers._train((state.round + 1, k))
                seen.append(whole())
            stack = torch.stack(seen) - origin
            sizes = [len(federation.shards[k]) for k in recipe.clients_in(state.round + 1)]
            mean = torch.from_numpy(np.average(stack.numpy(), 0, sizes))
            made = mean if rule == "fedavg" else torch.quantile(stack, 0.5, 0)
            state, result = run_round(state, federation, workers)
            for name, tensor in state_of(net).items():
                tensor.copy_(state.params[name])
            found = whole() - origin
            if rule == "median" and down == "frozen_a":  # of B, which is the client's all
                continue
            u, s, v = torch.linalg.svd(made, full_matrices=False)
            kept = 2 if down == "svd" else len(s)
            torch.testing.assert_close(
                found, u[:, :kept] * s[:kept] @ v[:kept], rtol=1e-3, atol=2e-5
            )
            if down != "frozen_a":
                assert 0 < result.numbers["lora_error"] < 1
                assert result.numbers["naive_lora_error"] > 1e-3


def test_directions_in_which_nothing_was_learnt_can_still_learn(root, tmp_path):
    """Where B and A were both 0, neither would have a gradient."""
    federation = started(recipe_of(root, tmp_path / "out"))
    state = federation.initial_state()
    loras = federation.loras
    nothing = {n: torch.zeros_like(t) for n, t in state.params.items() if "lora" in n}
    one = next(iter(loras.values()))
    nothing[one.b] = torch.zeros_like(state.params[one.b])
    nothing[one.b][:, 0] = 1.0  # of its two directions one
    update = as_products(loras, state.params, Update(nothing, Source("client", 1)))
    total = Aggregate(TaskArithmetic(), [update])
    after, told = lora_step(state, total, federation.recipe.server, federation.trained, loras)
    for each in loras.values():
        a, b = after.params[each.a], after.params[each.b]
        assert a.any(1).all()
        assert bool(b.any()) is (each is one)
    wanted = one.scale * nothing[one.b] @ state.params[one.a]
    torch.testing.assert_close(torch.mm(*one.of(after.params)), wanted, rtol=1e-4, atol=1e-6)
    assert told["lora_error"] < 1e-3


def test_a_mean_of_a_and_b_apart_is_off_by_what_is_told(root, tmp_path):
    federation = started(recipe_of(root, tmp_path / "out", aggregator="task_arithmetic"))
    state = federation.initial_state()
    with Workers(federation, state) as workers:
        state, _ = run_round(state, federation, workers)
        before = state
        state, result = run_round(state, federation, workers)
    wrong = right = 0.0
    for one in federation.loras.values():
        a0, b0 = before.params[one.a].double(), before.params[one.b].double()
        a = [a0 + u.delta[one.a] for u in result.updates.values()]
        b = [b0 + u.delta[one.b] for u in result.updates.values()]
        exact = sum(y @ x for x, y in zip(a, b, strict=True)) / 3
        wrong += float((sum(b) / 3 @ (sum(a) / 3) - exact).square().sum())
        right += float((exact - b0 @ a0).square().sum())
    assert result.numbers["naive_lora_error"] == pytest.approx((wrong / right) ** 0.5, rel=1e-3)


@pytest.mark.parametrize("down", DOWN)
def test_a_run_learns_counts_its_bytes_and_leaves_a_model_that_is_read_again(root, tmp_path, down):
    recipe = recipe_of(root, tmp_path / "run", lora_down=down, save_client_updates=("1",))
    net = load_net(recipe.model)
    task = load_task(recipe.data, net.inputs, 0)
    done = federate(net, task, recipe)
    base = evaluate(net, task).score
    model = load_net(tmp_path / "run" / "model")
    assert done.result["best_round"] > 0
    assert evaluate(model, task).score == pytest.approx(done.result["test_score"], abs=1e-5)
    assert done.result["test_score"] > base
    assert (tmp_path / "run/model/adapter_config.json").is_file() is (down != "residual")
    client = load_net(tmp_path / "run/updates/round-0001/client-1")
    assert bool(client.base) is (down != "residual")
    rows = [json.loads(line) for line in (tmp_path / "run/record.jsonl").read_text().splitlines()]
    last = rows[-1]
    shapes = [p.shape for n, p in net.module.named_parameters() if "proj" in n]
    one = sum(o * 2 + (0 if down == "frozen_a" else i * 2) for o, i in shapes)
    more = sum(o * i for o, i in shapes) if down == "residual" else 0
    assert last["bytes_up"] == 3 * 4 * one
    assert last["bytes_down"] == 3 * 4 * (one + more)


def test_any_number_of_workers_and_a_resumed_run_give_the_same_bits(root, tmp_path, monkeypatch):
    net = load_net(root / "base")
    task = load_task(str(root / "sums"), net.inputs, 0)
    federate(net, task, recipe_of(root, tmp_path / "one"))
    federate(net, task, recipe_of(root, tmp_path / "two", workers=2))
    stopped = recipe_of(root, tmp_path / "three")

    def stop(progress) -> None:
        if progress.done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        federate(net, task, stopped, on_progress=stop)
    federate(net, task, stopped, resume=True)
    one, two, three = (
        load_file(tmp_path / n / "model/model.safetensors") for n in ("one", "two", "three")
    )
    assert all(torch.equal(one[n], two[n]) and torch.equal(one[n], three[n]) for n in one)


def test_a_model_in_bfloat16_trains_in_float32(root, tmp_path):
    """In bfloat16 steps this small would be lost."""
    net = load_net(root / "base")
    net.module.bfloat16()
    task = load_task(str(root / "sums"), net.inputs, 0)
    small = {"lr": 1e-4, "local_steps": 1, "lora_rank": None}
    federation = started(recipe_of(root, tmp_path / "out", **small))
    federation = begin(net, task, federation.recipe, federation.shards, begun=False)
    state = federation.initial_state()
    with Workers(federation, state) as workers:
        after, _ = run_round(state, federation, workers)
    changed = [after.params[n] != t for n, t in state.params.items() if "mlp" in n]
    assert all(t.dtype == torch.float32 for t in after.params.values())
    assert all(one.double().mean() > 0.3 for one in changed)


def test_masks_train_a_share_of_a_lora_and_what_does_not_fit_is_refused(root, tmp_path):
    sparse = {"sparsity_ratio": 0.5, "mask_strategy": "random", "lora_down": "frozen_a"}
    net = load_net(root / "base")
    task = load_task(str(root / "sums"), net.inputs, 0)
    done = federate(net, task, recipe_of(root, tmp_path / "sparse", **sparse))
    assert done.result["best_round"] > 0
    scaffold = {"local_algorithm": "scaffold", "momentum": 0.0}
    with pytest.raises(DeltaflError, match="scaffold with a LoRA needs lora_down frozen_a"):
        recipe_of(root, tmp_path / "out", **scaffold)
