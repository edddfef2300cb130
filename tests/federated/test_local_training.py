"""Local training against plain loops of torch."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from deltafl.federated import ClientUpdate, LocalTraining, Round
from deltafl.federated.client import load_state, state_of
from deltafl.federated.rounds import Workers, run_round
from deltafl.models import ClassifierNet, load_net
from deltafl.tasks import ImageInput
from deltafl.training.step import batches as batches_of
from federated.worlds import RECIPE, Begun, assert_same, begin, halves, normed, plain

CLOSE = {"rtol": 1e-5, "atol": 2e-6}
"""Some ten float32 steps whose sums have another order."""


class Reference:
    """The same model as an ordinary module, its tensors by the names of the server's parameters."""

    def __init__(self, begun: Begun, params) -> None:
        self.module: nn.Module = copy.deepcopy(begun.federation.net.module)
        held = dict(self.module.named_parameters()) | dict(self.module.named_buffers())
        self.own = {n.removeprefix("encoder."): t for n, t in held.items()}
        with torch.no_grad():
            for name, value in params.items():
                self.own[name].copy_(value)
        self.trained = [p for p in self.module.parameters() if p.requires_grad]
        self.zero_grad()

    def loss(self, images: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
        self.module.train()
        logits = self.module(images)
        return nn.functional.cross_entropy(logits, labels, label_smoothing=smoothing)

    def zero_grad(self) -> None:
        self.module.zero_grad()


def batches(begun: Begun, client: int, number: int, steps: int):
    recipe, ids = begun.federation.recipe, begun.federation.shards[client]
    train, size = halves().splits["train"], recipe.local.batch_size
    for rows in batches_of(ids, size, recipe.seed, steps, f"round {number} client {client}"):
        yield train.images[rows], train.labels[rows]


def trained(
    begun: Begun, number: int = 1, client: int = 2, control: Tensor | None = None
) -> ClientUpdate:
    fed = begun.federation
    local = fed.recipe.local
    part = Round(number, client, fed.shards[client], local.local_steps, local.lr, control)
    return LocalTraining(fed.net, fed.task, fed.recipe)(begun.state.params, fed.mask, part)


def assert_moved(update: ClientUpdate, reference: Reference, start) -> None:
    for name in start:
        wanted = reference.own[name].detach() - start[name]
        torch.testing.assert_close(update.delta[name], wanted, **CLOSE)
        assert wanted.abs().max() > 1e-4, name


OPTIONS: list[dict[str, Any]] = [
    {"momentum": 0.0},
    {"momentum": 0.9},
    {"momentum": 0.8, "weight_decay": 0.1, "nesterov": True},
    {"momentum": 0.9, "grad_clip": 0.2, "label_smoothing": 0.3, "weight_decay": 0.05},
    {"momentum": 0.5, "local_algorithm": "fedprox", "prox_mu": 3.0},
]


@pytest.mark.parametrize("train_head", [False, True])
@pytest.mark.parametrize("make", [plain, normed])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_local_steps_are_those_of_torch(options, make, train_head: bool, tmp_path: Path) -> None:
    """From the server's values and statistics, whoever trained before; FedProx adds mu/2 ||x - x_0||^2."""
    smoothing = options.get("label_smoothing", 0.0)
    given = {k: v for k, v in options.items() if k != "label_smoothing"}
    recipe = RECIPE.replace(local_steps=5, train_head=train_head, **given)
    begun = begin(tmp_path, recipe, make(), replace(halves(), label_smoothing=smoothing))
    trained(begun, client=0)
    start, local = begun.state.params, recipe.local
    reference = Reference(begun, start)
    anchors = [p.detach().clone() for p in reference.trained]
    how = {"weight_decay": local.weight_decay, "nesterov": local.nesterov}
    sgd = torch.optim.SGD(reference.trained, local.lr, local.momentum, **how)
    losses = []
    for images, labels in batches(begun, 2, 1, 5):
        sgd.zero_grad()
        loss = reference.loss(images, labels, smoothing)
        pairs = zip(reference.trained, anchors, strict=True)
        gap = sum((p - anchor).square().sum() for p, anchor in pairs)
        (loss + options.get("prox_mu", 0.0) / 2 * gap).backward()
        if local.grad_clip:
            assert nn.utils.clip_grad_norm_(reference.trained, local.grad_clip) > local.grad_clip
        sgd.step()
        losses.append(loss.item())
    update = trained(begun)
    assert_moved(update, reference, start)
    assert update.loss == pytest.approx(sum(losses) / 5, rel=1e-5)
    assert update.source.prox_mu == options.get("prox_mu")
    assert ("head.weight" in start) == train_head
    if make is normed:
        assert int(begun.federation.net.module.encoder.norm.num_batches_tracked) == 7
        assert int(reference.own["norm.num_batches_tracked"]) == 7 + 5


@pytest.mark.parametrize("train_head", [False, True])
def test_scaffold_is_algorithm_1_with_option_ii(train_head: bool, tmp_path: Path) -> None:
    """Three rounds, so that clients take part again with a control of their own (arXiv 1910.06378)."""
    recipe = RECIPE.replace(
        num_clients=4, local_algorithm="scaffold", momentum=0.0, server_lr=0.8, train_head=train_head,
        aggregator="task_arithmetic", client_weights="uniform",
    )  # fmt: skip
    begun = begin(tmp_path, recipe)
    rounds = [recipe.clients_in(r) for r in (1, 2, 3)]
    assert max(sum(k in c for c in rounds) for k in range(4)) > 1
    state = begun.state
    names, local = list(state.params), recipe.local
    workers = Workers(begun.federation, state)
    c: dict[str, Tensor] = {n: torch.zeros_like(state.params[n]) for n in names}
    own = {k: {n: torch.zeros_like(t) for n, t in c.items()} for k in range(4)}
    x = dict(state.params)
    for number, chosen in enumerate(rounds, 1):
        state, _ = run_round(state, begun.federation, workers)
        moves, changes = [], []
        for k in chosen:
            reference = Reference(begun, x)
            for images, labels in batches(begun, k, number, local.local_steps):
                reference.zero_grad()
                reference.loss(images, labels).backward()
                with torch.no_grad():
                    for n in names:
                        grad = reference.own[n].grad
                        reference.own[n] -= local.lr * (grad - own[k][n] + c[n])
            y = {n: reference.own[n].detach() for n in names}
            new = {
                n: own[k][n] - c[n] + (x[n] - y[n]) / (local.local_steps * local.lr) for n in names
            }
            moves.append({n: y[n] - x[n] for n in names})
            changes.append({n: new[n] - own[k][n] for n in names})
            own[k] = new
        x = {n: x[n] + 0.8 * sum(m[n] for m in moves) / len(moves) for n in names}
        c = {n: c[n] + sum(d[n] for d in changes) / 4 for n in names}
        torch.testing.assert_close(dict(state.params), x, rtol=1e-4, atol=1e-5)
        pairs = [(state.control, c)]
        for k in own:
            read = begun.federation.controls.read(k, number + 1, state.control)
            pairs.append((read, own[k]))
        for ours, theirs in pairs:
            flat = torch.cat([theirs[n].reshape(-1) for n in names])
            torch.testing.assert_close(ours, flat, rtol=1e-3, atol=1e-4)


def test_a_tensor_that_is_frozen_whole_has_no_gradient_and_changes_no_bit(tmp_path: Path) -> None:
    begun = begin(tmp_path, RECIPE.replace(sparsity_ratio=0.5, mask_strategy="random"))
    fed, start = begun.federation, begun.state.params
    net, part = fed.net, Round(1, 2, fed.shards[2], 3, 0.05)
    ours = LocalTraining(net, fed.task, fed.recipe)
    assert fed.mask is not None
    mask = {**fed.mask, "encoder.first.weight": torch.zeros(12, 64, dtype=torch.bool)}
    nearly = {n: m.clone() for n, m in mask.items()}
    nearly["encoder.first.weight"][0, 0] = True
    found = []
    for given in (mask, nearly):
        update = ours(start, given, part)
        assert net.flat.grad is not None
        assert bool(net.flat.grad[net.slices["encoder.first.weight"]].any()) == (given is nearly)
        found.append({n: update.delta[n] for n in start})
    assert not found[0]["first.weight"].any()
    assert torch.equal(found[0]["last.weight"].ne(0), found[1]["last.weight"].ne(0))
    dense = ours(start, None, part)
    assert dense.delta["first.weight"].ne(0).sum() > 9


def test_clipping_sees_the_kept_coordinates_only(tmp_path: Path) -> None:
    recipe = RECIPE.replace(sparsity_ratio=0.8, mask_strategy="random", grad_clip=0.05, local_steps=4, momentum=0.0,
        local_algorithm="fedprox", prox_mu=0.5,
    )  # fmt: skip
    begun = begin(tmp_path, recipe)
    start = begun.state.params
    assert begun.federation.mask is not None
    mask = {n.removeprefix("encoder."): m for n, m in begun.federation.mask.items()}
    reference = Reference(begun, start)
    for images, labels in batches(begun, 2, 1, 4):
        reference.zero_grad()
        reference.loss(images, labels).backward()
        with torch.no_grad():
            kept = {
                n: (reference.own[n].grad + 0.5 * (reference.own[n] - start[n])) * mask[n]
                for n in mask
            }
            norm = torch.cat([g.reshape(-1) for g in kept.values()]).norm()
            whole = torch.cat([reference.own[n].grad.reshape(-1) for n in mask]).norm()
            assert whole > 1.3 * norm > 1.3 * 0.05
            for n, g in kept.items():
                reference.own[n] -= recipe.local.lr * g * min(1.0, 0.05 / (float(norm) + 1e-6))
    update = trained(begun)
    for n, m in mask.items():
        torch.testing.assert_close(update.delta[n], reference.own[n].detach() - start[n], **CLOSE)
        assert not update.delta[n][~m].any()


def test_dropout_is_keyed_and_leaves_the_global_generator_alone(tmp_path: Path) -> None:
    begun = begin(tmp_path, RECIPE, load_net("federated.worlds:Dropping"))
    before = torch.random.get_rng_state()
    first = dict(trained(begun).delta)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.rand(17)
    assert_same(dict(trained(begun).delta), first)
    still = dict(trained(begin(tmp_path, RECIPE)).delta)
    assert not torch.equal(still["first.weight"], first["first.weight"])


def test_names_are_those_of_files_unless_another_tensor_has_them() -> None:
    class Colliding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.ModuleDict({"head": nn.Linear(2, 2), "body": nn.Linear(2, 2)})
            self.head = nn.Linear(2, 3)

    net = ClassifierNet(Colliding(), ImageInput(8, 1))
    assert set(state_of(net)) == {
        "encoder.head.weight", "encoder.head.bias", "body.weight", "body.bias", "head.weight", "head.bias",
    }  # fmt: skip
    state = {n: t + 1 for n, t in state_of(net).items()}
    load_state(state_of(net), state)
    assert_same(state_of(net), state)
