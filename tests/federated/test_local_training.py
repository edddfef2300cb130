"""Local training against plain loops of torch."""

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from deltafl.federated import ClientUpdate, FederatedRecipe, choose_clients, federate, run_round
from deltafl.federated import client as client_module
from deltafl.federated.client import LocalTraining, Round
from deltafl.models import load_encoder
from deltafl.tasks.arrays import Split
from deltafl.training.step import batch_ids
from federated.worlds import RECIPE, Begun, assert_same, begin, normed

CLOSE = {"rtol": 1e-5, "atol": 2e-6}
"""Some ten float32 steps whose sums have another order."""


class Reference(nn.Module):
    """The encoder and its head as one ordinary module."""

    def __init__(self, begun: Begun, params) -> None:
        super().__init__()
        model, head = begun.setting.model, begun.setting.head
        self.encoder = copy.deepcopy(model.module)
        self.spec = model.encoder.input
        self.head = nn.Linear(head.feature_dim, len(head.class_names))
        self.head.weight.data = head.weight.detach().clone()
        self.head.bias.data = head.bias.detach().clone()
        own = dict(self.encoder.named_parameters()) | dict(self.encoder.named_buffers())
        own |= {"deltafl_head.weight": self.head.weight, "deltafl_head.bias": self.head.bias}
        with torch.no_grad():
            for name, value in params.items():
                own[name].copy_(value)
        self.own = own
        self.trained = [
            *self.encoder.parameters(),
            *(self.head.parameters() if head.parameters() else ()),
        ]

    def loss(self, images: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
        self.encoder.train()
        logits = self.head(self.encoder(self.spec.normalise(images)))
        return nn.functional.cross_entropy(logits, labels, label_smoothing=smoothing)


def batches(begun: Begun, client: int, number: int, steps: int):
    recipe, train, ids = (
        begun.setting.recipe,
        begun.setting.task.train,
        begun.setting.shards[client],
    )
    for step in range(steps):
        rows = ids[
            batch_ids(
                len(ids), recipe.batch_size, recipe.seed, step, f"round {number} client {client}"
            )
        ]
        yield train.images[rows], train.labels[rows]


def trained(
    begun: Begun, number: int = 1, client: int = 2, control: Tensor | None = None
) -> ClientUpdate:
    recipe, world = begun.setting.recipe, begun.world
    part = Round(
        number, client, world.split, world.shards[client], recipe.local_steps, recipe.lr, control
    )
    return LocalTraining(begun.setting.model, begun.setting.head, recipe)(
        begun.state.params, world.mask, part
    )


def assert_moved(update: ClientUpdate, reference: Reference, start) -> None:
    for name in start:
        wanted = reference.own[name].detach() - start[name]
        torch.testing.assert_close(
            update.delta[name], wanted, **CLOSE, msg=lambda m, n=name: f"{n}: {m}"
        )
        assert wanted.abs().max() > 1e-4, name


@pytest.mark.parametrize("train_head", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {"momentum": 0.0},
        {"momentum": 0.9},
        {"momentum": 0.8, "weight_decay": 0.1, "nesterov": True},
        {"momentum": 0.9, "grad_clip": 0.2, "label_smoothing": 0.3, "weight_decay": 0.05},
    ],
    ids=str,
)
def test_sgd_is_that_of_torch(options: dict, train_head: bool, tmp_path: Path) -> None:
    recipe = replace(RECIPE, local_steps=5, train_head=train_head, **options)
    begun = begin(tmp_path, recipe)
    start = begun.state.params
    reference = Reference(begun, start)
    sgd = torch.optim.SGD(
        reference.trained,
        recipe.lr,
        recipe.momentum,
        weight_decay=recipe.weight_decay,
        nesterov=recipe.nesterov,
    )
    losses = []
    for images, labels in batches(begun, 2, 1, 5):
        sgd.zero_grad()
        loss = reference.loss(images, labels, recipe.label_smoothing)
        loss.backward()
        if recipe.grad_clip:
            assert nn.utils.clip_grad_norm_(reference.trained, recipe.grad_clip) > recipe.grad_clip
        sgd.step()
        losses.append(loss.item())
    update = trained(begun)
    assert_moved(update, reference, start)
    assert update.loss == pytest.approx(sum(losses) / 5, rel=1e-5)
    assert ("deltafl_head.weight" in start) == train_head


def test_fedprox_is_pulled_to_the_servers_parameters(tmp_path: Path) -> None:
    recipe = replace(RECIPE, local_steps=6, local_algorithm="fedprox", prox_mu=3.0, momentum=0.5)
    begun = begin(tmp_path, recipe)
    start = begun.state.params
    reference = Reference(begun, start)
    anchors = [p.detach().clone() for p in reference.trained]
    sgd = torch.optim.SGD(reference.trained, recipe.lr, recipe.momentum)
    for images, labels in batches(begun, 2, 1, 6):
        sgd.zero_grad()
        gap = sum((p - a).square().sum() for p, a in zip(reference.trained, anchors, strict=True))
        (reference.loss(images, labels) + 3.0 / 2 * gap).backward()
        sgd.step()
    update = trained(begun)
    assert_moved(update, reference, start)
    free = trained(replace_recipe(begun, prox_mu=0.0))
    assert update.delta["first.weight"].norm() < 0.9 * free.delta["first.weight"].norm()
    assert update.source.prox_mu == 3.0


def replace_recipe(begun: Begun, **changes) -> Begun:
    recipe = replace(begun.setting.recipe, **changes)
    return replace(
        begun,
        setting=replace(begun.setting, recipe=recipe),
        world=replace(begun.world, recipe=recipe),
    )


@pytest.mark.parametrize("train_head", [False, True])
def test_scaffold_is_algorithm_1_with_option_ii(train_head: bool, tmp_path: Path) -> None:
    """Three rounds, so that clients take part again with a control of their own (arXiv 1910.06378)."""
    recipe = replace(
        RECIPE, num_clients=4, local_algorithm="scaffold", momentum=0.0, server_lr=0.8, train_head=train_head,
        aggregator="task_arithmetic", client_weights="uniform",
    )  # fmt: skip
    begun = begin(tmp_path, recipe)
    rounds = [choose_clients(recipe, r) for r in (1, 2, 3)]
    assert max(sum(k in c for c in rounds) for k in range(4)) > 1
    state = begun.state
    names = [n for n in state.params if n in begun.setting.model.slices] + [
        n for n in state.params if "head" in n
    ]
    c: dict[str, Tensor] = {n: torch.zeros_like(state.params[n]) for n in names}
    own = {k: {n: torch.zeros_like(t) for n, t in c.items()} for k in range(4)}
    x = dict(state.params)
    for number, chosen in enumerate(rounds, 1):
        state, _ = run_round(state, begun.world)
        moves, changes = [], []
        for k in chosen:
            reference = Reference(begun, x)
            for images, labels in batches(begun, k, number, recipe.local_steps):
                reference.zero_grad()
                reference.loss(images, labels).backward()
                with torch.no_grad():
                    for n in names:
                        grad = reference.own[n].grad
                        reference.own[n] -= recipe.lr * (grad - own[k][n] + c[n])
            y = {n: reference.own[n].detach() for n in names}
            new = {
                n: own[k][n] - c[n] + (x[n] - y[n]) / (recipe.local_steps * recipe.lr)
                for n in names
            }
            moves.append({n: y[n] - x[n] for n in names})
            changes.append({n: new[n] - own[k][n] for n in names})
            own[k] = new
        x = {n: x[n] + 0.8 * sum(m[n] for m in moves) / len(moves) for n in names}
        c = {n: c[n] + sum(d[n] for d in changes) / 4 for n in names}
        for n in names:
            torch.testing.assert_close(state.params[n], x[n], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(
            state.control, torch.cat([c[n].reshape(-1) for n in names]), rtol=1e-3, atol=1e-4
        )
        for k in state.control_rounds:
            held = begun.world.controls.read(k, state.control_rounds)
            torch.testing.assert_close(
                held, torch.cat([own[k][n].reshape(-1) for n in names]), rtol=1e-3, atol=1e-4
            )


def test_clipping_sees_the_kept_coordinates_only(tmp_path: Path) -> None:
    recipe = replace(
        RECIPE, sparsity_ratio=0.8, mask_strategy="random", grad_clip=0.05, local_steps=4, momentum=0.0,
        local_algorithm="fedprox", prox_mu=0.5, label_smoothing=0.1,
    )  # fmt: skip
    begun = begin(tmp_path, recipe)
    start, mask = begun.state.params, begun.setting.mask
    assert mask is not None
    reference = Reference(begun, start)
    for images, labels in batches(begun, 2, 1, 4):
        reference.zero_grad()
        reference.loss(images, labels, 0.1).backward()
        with torch.no_grad():
            kept = {
                n: (reference.own[n].grad + 0.5 * (reference.own[n] - start[n])) * mask[n]
                for n in mask
            }
            norm = torch.cat([g.reshape(-1) for g in kept.values()]).norm()
            whole = torch.cat([reference.own[n].grad.reshape(-1) for n in mask]).norm()
            assert whole > 1.3 * norm > 1.3 * 0.05
            for n, g in kept.items():
                reference.own[n] -= recipe.lr * g * min(1.0, 0.05 / (float(norm) + 1e-6))
    update = trained(begun)
    for n, m in mask.items():
        torch.testing.assert_close(update.delta[n], reference.own[n].detach() - start[n], **CLOSE)
        assert not update.delta[n][~m].any()


def test_batch_norm_starts_from_the_servers_statistics(tmp_path: Path) -> None:
    begun = begin(tmp_path, replace(RECIPE, momentum=0.0), normed())
    trained(begun, client=0)
    start = begun.state.params
    reference = Reference(begun, start)
    sgd = torch.optim.SGD(reference.trained, RECIPE.lr)
    for images, labels in batches(begun, 2, 1, RECIPE.local_steps):
        sgd.zero_grad()
        reference.loss(images, labels).backward()
        sgd.step()
    assert_moved(trained(begun), reference, start)
    assert int(begun.setting.model.module.norm.num_batches_tracked) == 7
    assert int(reference.encoder.norm.num_batches_tracked) == 7 + RECIPE.local_steps


def test_who_trained_before_does_not_matter(tmp_path: Path) -> None:
    """Momentum, the working model and its buffers start anew for every client."""
    recipe = replace(RECIPE, momentum=0.9, train_head=True)
    one, two = begin(tmp_path, recipe, normed()), begin(tmp_path, recipe, normed())
    client = LocalTraining(two.setting.model, two.setting.head, recipe)
    world = two.world
    for k in (4, 0, 2):
        part = Round(1, k, world.split, world.shards[k], recipe.local_steps, recipe.lr)
        last = client(two.state.params, None, part)
    assert_same(dict(trained(one).delta), dict(last.delta))
    other = trained(one, client=3)
    assert not torch.equal(other.delta["first.weight"], last.delta["first.weight"])
    assert not torch.equal(trained(one, number=2).delta["first.weight"], last.delta["first.weight"])


def test_dropout_is_keyed_and_leaves_the_global_generator_alone(tmp_path: Path) -> None:
    begun = begin(tmp_path, RECIPE, load_encoder("federated.worlds:Dropping"))
    before = torch.random.get_rng_state()
    first = dict(trained(begun).delta)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.rand(17)
    assert_same(dict(trained(begun).delta), first)
    still = dict(trained(begin(tmp_path, RECIPE)).delta)
    assert not torch.equal(still["first.weight"], first["first.weight"])


def test_augmentation_is_of_training_batches_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe: FederatedRecipe = replace(RECIPE, augment="crop_flip", num_rounds=2)
    seen: list[Tensor] = []
    original = client_module.augmented

    def recorded(images: Tensor, kind: str, generator: torch.Generator) -> Tensor:
        seen.append(images)
        assert kind == "crop_flip"
        return original(images, kind, generator)

    monkeypatch.setattr(client_module, "augmented", recorded)
    begun = begin(tmp_path, recipe)
    task = begun.setting.task
    run = federate(
        begun.setting.model.encoder, task, recipe, tmp_path / "run", device="cpu", workers=1
    )
    assert len(seen) == sum(r["num_steps"] for r in run.rows if r["event"] == "round") == 2 * 3 * 3
    train = {bytes(x.numpy()) for x in task.train.images}
    assert all(bytes(x.numpy()) in train for images in seen for x in images)
    seen.clear()
    plain = federate(
        begun.setting.model.encoder,
        task,
        replace(recipe, augment="none"),
        tmp_path / "plain",
        device="cpu",
        workers=1,
    )
    assert not seen
    assert plain.rows[0]["val_score"] == run.rows[0]["val_score"]
    assert plain.rows[1]["loss"] != run.rows[1]["loss"]


@pytest.mark.parametrize("kind", ["flip", "crop_flip"])
def test_augmented_images_are_the_same_pictures_mirrored_or_shifted(kind: str) -> None:
    split = Split(
        torch.arange(64).view(1, 1, 8, 8).repeat(40, 1, 1, 1).to(torch.uint8) + 1, torch.zeros(40)
    )
    out = client_module.augmented(split.images, kind, torch.Generator().manual_seed(0))
    assert out.shape == split.images.shape
    assert out.dtype == torch.uint8
    assert torch.equal(
        out, client_module.augmented(split.images, kind, torch.Generator().manual_seed(0))
    )
    variants = {bytes(x.numpy()) for x in out}
    mirrored = {bytes(split.images[0].numpy()), bytes(split.images[0].flip(-1).numpy())}
    assert variants == mirrored if kind == "flip" else len(variants) > 5
