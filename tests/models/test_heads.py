from dataclasses import replace
from pathlib import Path

import pytest
import torch

from checkpoint_files import fails
from deltafl.errors import DeltaflError
from deltafl.models import HeadFit, HeadRecipe
from deltafl.models import fit as fitting
from deltafl.models.fit import few_per_class, random_head, ridge_head
from deltafl.models.head import Head, save_head
from deltafl.tasks import load_task
from tiny_models import tiny_images, tiny_llama, tiny_net, write_lines

NAMES = ("a", "b", "c")


def data(count: int, seed: int = 0, dim: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 3, (count,), generator=generator)
    centres = torch.randn(3, dim, generator=torch.Generator().manual_seed(9))
    return 3 + centres[labels] + torch.randn(count, dim, generator=generator), labels


def reference(features: torch.Tensor, labels: torch.Tensor, strength: float) -> Head:
    """The ridge head in closed form, from Fed3R's sums of z z^T and z y^T over two clients."""
    D, sums = features.shape[1], torch.zeros(features.shape[1] + 1, features.shape[1] + 4).double()
    for own, classes in zip(features.tensor_split(2), labels.tensor_split(2), strict=True):
        z = torch.nn.functional.pad(own.double(), (0, 1), value=1.0)
        sums += z.T @ torch.cat([z, torch.nn.functional.one_hot(classes, 3).double()], 1)
    means = sums[D] / sums[D, D]
    centred = sums[:D] - torch.outer(sums[:D, D], means)
    C, G = centred[:, :D], centred[:, D + 1 :]
    W = torch.linalg.solve(C + strength * C.diagonal().mean() * torch.eye(D).double(), G)
    return Head(W.T.float(), (means[D + 1 :] - means[:D] @ W).float(), NAMES)


@pytest.mark.parametrize("strength", [1e-4, 0.1, 10.0])
def test_ridge_is_what_the_sums_of_clients_determine(
    strength: float, monkeypatch: pytest.MonkeyPatch
):
    features, labels = data(80)
    monkeypatch.setattr(fitting, "STRENGTHS", (strength,))
    monkeypatch.setattr(fitting, "TEMPERATURES", (1.0,))
    head = ridge_head(features, labels, (features, labels), NAMES)
    expected = reference(features, labels, strength)
    torch.testing.assert_close(head.weight, expected.weight, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(head.bias, expected.bias, rtol=1e-5, atol=1e-6)


def test_strength_and_temperature_are_the_best_of_those_tried(monkeypatch: pytest.MonkeyPatch):
    features, labels = data(60)
    val, val_labels = data(40, seed=1)
    strengths = (1e1, 1e-1, 1e-3)
    monkeypatch.setattr(fitting, "STRENGTHS", strengths)
    chosen = ridge_head(features, labels, (val, val_labels), NAMES)

    def accuracy(head: Head) -> float:
        return (head(val).argmax(1) == val_labels).double().mean().item()

    candidates = [reference(features, labels, s) for s in strengths]
    assert accuracy(chosen) == max(map(accuracy, candidates))
    origin = max(candidates, key=accuracy)
    T = (chosen.weight[0, 0] / origin.weight[0, 0]).item()
    torch.testing.assert_close(chosen.weight, origin.weight * T, rtol=1e-5, atol=1e-5)

    def loss(scale: float) -> float:
        return torch.nn.functional.cross_entropy(scale * origin(val), val_labels).item()

    assert 1 < T < 1024
    assert loss(T) <= min(loss(T * 2**0.25), loss(T * 2**-0.25))


def test_few_per_class():
    labels = torch.tensor([0] * 10 + [1] * 2 + [2] * 10)
    ids = few_per_class(labels, 3, torch.Generator().manual_seed(0))
    assert torch.bincount(labels[ids]).tolist() == [3, 2, 3]
    assert ids.tolist() == sorted(set(ids.tolist()))
    assert not torch.equal(ids, few_per_class(labels, 3, torch.Generator().manual_seed(1)))


@pytest.mark.parametrize("kind", ["ridge", "few", "probe", "linear", "file"])
def test_a_classifier_gets_the_head_of_its_recipe(kind: str, tmp_path: Path):
    task, few = tiny_images(train=300, val=90), 1 if kind == "few" else None
    file = tmp_path / "h.safetensors"
    given = random_head(16, task.class_names, torch.Generator())
    save_head(given, file)
    name = {"few": "ridge", "file": str(file)}.get(kind, kind)
    nets = [tiny_net() for _ in range(3)]
    for net, trained in zip(nets, (False, False, True), strict=True):
        net.prepare(task, HeadRecipe(head=name, few_shot=few, train_head=trained), HeadFit(3))
        net.check(task)
        assert ("head.weight" in net.trained) is trained
    heads = [net.head for net in nets]
    assert heads[0].class_names == task.class_names
    assert all(torch.equal(head.weight, heads[0].weight) for head in heads)
    if kind == "file":
        assert torch.equal(heads[0].weight, given.weight)
        assert torch.equal(heads[0].bias, given.bias)
        assert not heads[0].normalised
    if kind == "few":
        nets[1].prepare(task, HeadRecipe())
        assert not torch.equal(nets[1].head.weight, heads[0].weight)


@pytest.mark.parametrize("kind", ["ridge", "probe"])
def test_a_head_is_fitted_on_what_the_shards_hold(kind: str):
    """All examples in shards are all examples; those in no shard are not used."""
    task, parts = tiny_images(), (torch.arange(0, 50, 2), torch.arange(1, 50, 2))
    weights = []
    for shards in (None, parts, parts[:1]):
        net = tiny_net()
        net.prepare(task, HeadRecipe(head=kind), HeadFit(shards=shards))
        weights.append(net.head.weight)
    assert torch.equal(weights[1], weights[0])
    assert not torch.allclose(weights[2], weights[0], rtol=1e-2, atol=1e-2)


def test_what_is_no_head_for_a_model_and_a_task(tmp_path: Path):
    net, task = tiny_net(), tiny_images()
    fails(r"has no head.safetensors; give a head with --head", net.check, task)
    fails("has no head yet", lambda: net(task.batch("val", torch.arange(2))["images"]))
    net.prepare(task, HeadRecipe(head="linear"))
    with pytest.raises(DeltaflError, match='the task has 3, "dark" for "light"'):
        net.check(replace(task, class_names=("light", "left", "right")))
    (tmp_path / "text").write_text("not safetensors at all")
    for name in ("text", "none"):
        with pytest.raises(DeltaflError, match="cannot be read"):
            net.prepare(task, HeadRecipe(head=str(tmp_path / name)))
    fails("a head of 3 classes has weight", Head, torch.zeros(2, 4), torch.zeros(2), NAMES)
    head = random_head(4, NAMES, torch.Generator())
    for dim, names, told in (
        (5, NAMES, "takes 4 features .* the model gives 5"),
        (4, ("a", "b"), "3 classes, .* the task has 2"),
        (4, ("a", "b", "x"), 'the task has 3, "c" for "x"'),
    ):
        fails(told, head.check, dim, names, "h")
    language = tiny_llama(tmp_path)
    lines = load_task(str(write_lines(tmp_path / "lines")), language.inputs)
    with pytest.raises(DeltaflError, match=r'no image classifier, .* leave out head "probe"'):
        language.prepare(lines, HeadRecipe(head="probe"))
    fails(r"takes images; task .* has none", lambda: net.prepare(lines, HeadRecipe()))
    for settings in ({"head": "probe", "few_shot": 3}, {"templates": "x"}, {"few_shot": 0}):
        with pytest.raises(DeltaflError):
            HeadRecipe.of(**settings)
