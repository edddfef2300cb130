import math
from itertools import pairwise

import pytest
import torch
from torch import nn

from deltafl.errors import DeltaflError
from deltafl.merge.scores import Scorer
from deltafl.models.flat import FlatModel
from deltafl.seeding import keyed_generator
from deltafl.tasks.arrays import Split
from deltafl.training.legacy import Accuracy, Batch, extract_features, predict_correct, train_step
from deltafl.training.step import batch_ids, batches, default_warmup, lr_at
from tiny_models import tiny_head, tiny_task, tiny_vit


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
@pytest.mark.parametrize("train_head", [False, True])
def test_steps_are_those_of_torch_on_ordinary_parameters(kind: str, train_head: bool):
    """The reference shares no code but the network: mean cross-entropy, clip, optimiser on a list of parameters."""
    encoder, head, task = tiny_vit(), tiny_head(), tiny_task()
    plain = encoder.copy_to("cpu")
    model = FlatModel(encoder)
    weight, bias = nn.Parameter(head.weight.clone()), nn.Parameter(head.bias.clone())
    ours = head.trainable() if train_head else head
    settings = {"weight_decay": 0.1}

    def optimiser(parameters):
        if kind == "sgd":
            return torch.optim.SGD(parameters, lr=1.0, momentum=0.9, **settings)
        return torch.optim.AdamW(parameters, lr=1.0, **settings)

    reference = optimiser([*plain.module.parameters(), *([weight, bias] if train_head else [])])
    flat = optimiser([model.flat, *ours.parameters()])
    plain.module.train()
    for step in range(6):
        ids = batch_ids(len(task.train), 16, 0, step)
        images, labels = task.train.images[ids], task.train.labels[ids]
        lr = lr_at(step, 6, 2, 1e-2)
        loss = train_step(
            model, ours, Batch(images, labels), flat, lr=lr, grad_clip=0.5, label_smoothing=0.1
        )

        reference.zero_grad()
        logits = plain.features(images) @ weight.T + bias
        expected = nn.functional.cross_entropy(logits, labels, label_smoothing=0.1)
        expected.backward()
        nn.utils.clip_grad_norm_([p for g in reference.param_groups for p in g["params"]], 0.5)
        reference.param_groups[0]["lr"] = lr
        reference.step()
        torch.testing.assert_close(loss, expected.detach())
    for name, parameter in plain.module.named_parameters():
        if kind == "adamw" and name.endswith("k_proj.bias"):
            continue  # softmax does not see them: their gradient is rounding noise, which Adam scales up
        torch.testing.assert_close(model.tensors()[name], parameter.detach(), rtol=1e-4, atol=2e-6)
    if train_head:
        torch.testing.assert_close(ours.weight, weight, rtol=1e-4, atol=2e-6)
    else:
        assert torch.equal(ours.weight, head.weight)


def test_parts_of_a_batch_sum_to_the_batch():
    """Two processes: each sees a part, an empty one too; the sum of what they reduce is the whole batch's gradient."""
    task = tiny_task()
    images, labels = task.train.images[:7], task.train.labels[:7]

    def gradient(*parts: slice) -> tuple[torch.Tensor, torch.Tensor]:
        total, losses = torch.zeros(()), torch.zeros(())
        for part in parts:
            model = FlatModel(tiny_vit())
            batch = Batch(images[part], labels[part], total=7)
            losses = losses + train_step(
                model, tiny_head(), batch, torch.optim.SGD([model.flat]), lr=0.0, grad_clip=None
            )
            total = total + model.flat.grad
        return total, losses

    whole, loss = gradient(slice(None))
    parts, sum_of_losses = gradient(slice(0, 5), slice(5, 7), slice(7, 7))
    torch.testing.assert_close(parts, whole)
    torch.testing.assert_close(sum_of_losses, loss)


def test_gradients_do_not_add_up_over_steps():
    model, task = FlatModel(tiny_vit()), tiny_task()
    optimiser = torch.optim.SGD([model.flat])
    batch = Batch(task.train.images[:4], task.train.labels[:4])
    train_step(model, tiny_head(), batch, optimiser, lr=0.0, grad_clip=None)
    once = model.flat.grad.clone()
    train_step(model, tiny_head(), batch, optimiser, lr=0.0, grad_clip=None)
    assert torch.equal(model.flat.grad, once)


def test_learning_rates():
    rates = [lr_at(s, 100, 10, 2.0) for s in range(101)]
    assert rates[:10] == pytest.approx([0.2 * (s + 1) for s in range(10)])
    assert rates[10] == 2.0
    assert rates[55] == pytest.approx(1.0)
    assert rates[100] == pytest.approx(0.0)
    assert all(a >= b for a, b in pairwise(rates[10:]))
    assert [lr_at(s, 5, 0, 2.0, "constant") for s in range(5)] == [2.0] * 5
    assert [lr_at(s, 4, 0, 2.0, "linear") for s in range(4)] == [2.0, 1.5, 1.0, 0.5]
    assert [lr_at(s, 12, 2, 2.0, "linear") for s in (0, 1, 2, 7)] == [1.0, 2.0, 2.0, 1.0]
    assert (default_warmup(100), default_warmup(9000)) == (10, 500)
    with pytest.raises(DeltaflError, match='did you mean "cosine"'):
        lr_at(0, 1, 0, 1.0, "cosin")


def test_the_step_schedule_is_that_of_torch():
    """He et al. divide the rate by 10 at 32k and 48k of 64k iterations; here at the same shares of 8 steps."""
    optimiser = torch.optim.SGD([torch.zeros(1)], lr=3.0)
    reference = torch.optim.lr_scheduler.MultiStepLR(optimiser, milestones=[4, 6], gamma=0.1)
    for step in range(8):
        assert lr_at(step, 8, 0, 3.0, "step") == pytest.approx(optimiser.param_groups[0]["lr"])
        assert lr_at(step + 5, 13, 5, 3.0, "step") == lr_at(step, 8, 0, 3.0, "step")
        optimiser.step()
        reference.step()


@pytest.mark.parametrize(("count", "size"), [(50, 16), (48, 16), (5, 16)])
def test_an_epoch_is_a_permutation(count: int, size: int):
    per_epoch = math.ceil(count / size)
    epochs = [
        torch.cat([batch_ids(count, size, 3, e * per_epoch + i) for i in range(per_epoch)])
        for e in range(3)
    ]
    for order in epochs:
        assert sorted(order.tolist()) == list(range(count))
    assert not torch.equal(epochs[0], epochs[1])
    assert not torch.equal(batch_ids(count, size, 3, 0), batch_ids(count, size, 4, 0))
    assert not torch.equal(
        batch_ids(count, size, 3, 0), batch_ids(count, size, 3, 0, purpose="calibration")
    )


@pytest.mark.parametrize(
    ("count", "size", "steps"), [(50, 16, 9), (48, 16, 3), (5, 16, 4), (7, 7, 1)]
)
def test_batches_are_those_of_each_step(count: int, size: int, steps: int):
    ids = torch.arange(count) * 3 + 1
    drawn = list(batches(ids, size, 3, steps, "client 2"))
    expected = [ids[batch_ids(count, size, 3, step, "client 2")] for step in range(steps)]
    assert len(drawn) == steps
    assert all(torch.equal(a, b) for a, b in zip(drawn, expected, strict=True))


def test_generators_are_keyed():
    def draw(*key: int | str) -> float:
        return torch.rand((), generator=keyed_generator(*key), dtype=torch.float64).item()

    assert draw(1, "a", 2) == draw(1, "a", 2)
    assert len({draw(1, "a"), draw(1, "b"), draw(2, "a"), draw(1, "a", 0), draw("1", "a")}) == 5


@pytest.mark.parametrize("batch_size", [1, 7, 100])
def test_accuracy_is_that_of_a_plain_loop(batch_size: int):
    model, head, split = FlatModel(tiny_vit()), tiny_head(), tiny_task().test
    model.module.train()
    correct = predict_correct(model, head, split, batch_size=batch_size)
    assert model.module.training
    expected = []
    with torch.no_grad():
        model.module.eval()
        for image, label in zip(split.images, split.labels, strict=True):
            logits = model.features(image[None])[0] @ head.weight.T + head.bias
            expected.append(int(logits.argmax() == label))
    assert (correct.dtype, correct.tolist()) == (torch.uint8, expected)
    assert 0 < sum(expected) < len(expected)

    scorer: Scorer = Accuracy(split, head.trainable(), batch_size)
    ids = torch.tensor([9, 0, 9, 4])
    assert scorer(model, ids).tolist() == [expected[i] for i in ids.tolist()]
    assert len(scorer) == len(split)
    assert scorer(model, ids[:0]).tolist() == []


def test_features_can_be_trained_on():
    """Inference tensors cannot: what comes out must be ordinary."""
    model, split = FlatModel(tiny_vit()), tiny_task().val
    features = extract_features(model, split)
    assert features.shape == (20, 16)
    weight = torch.zeros(16, requires_grad=True)
    (features @ weight).sum().backward()
    torch.testing.assert_close(weight.grad, features.sum(0))
    assert extract_features(model, Split(split.images[:0], split.labels[:0])).shape == (0, 16)


def test_autocast_changes_little_and_keeps_float32():
    model, split = FlatModel(tiny_vit()), tiny_task().val
    half = extract_features(model, split, autocast=torch.bfloat16)
    full = extract_features(model, split)
    assert half.dtype == torch.float32
    assert not torch.equal(half, full)
    torch.testing.assert_close(half, full, rtol=0.1, atol=0.1)
