import math
from itertools import pairwise

import pytest
import torch
from torch import nn

from deltafl.errors import DeltaflError
from deltafl.models import HeadRecipe, Net
from deltafl.seeding import keyed_generator
from deltafl.tasks import LineTask, load_task
from deltafl.training.step import (
    batch_ids,
    batches,
    keyed_dropout,
    lr_at,
    scores,
    train_step,
)
from tiny_models import tiny_images, tiny_llama, tiny_net, write_lines


def classifier(train_head: bool = False) -> Net:
    net = tiny_net()
    net.prepare(tiny_images(), HeadRecipe(head="linear", train_head=train_head))
    return net


@pytest.fixture
def language(tmp_path) -> tuple[Net, LineTask]:
    net = tiny_llama(tmp_path / "llama")
    task = load_task(str(write_lines(tmp_path / "lines")), net.inputs)
    assert isinstance(task, LineTask)
    return net, task


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
@pytest.mark.parametrize("train_head", [False, True])
def test_steps_are_those_of_torch_on_ordinary_parameters(kind: str, train_head: bool):
    """The reference shares no code but the network: mean cross-entropy, clip, optimiser on a list of parameters."""
    net, plain, task = classifier(train_head), classifier(train_head).module, tiny_images()
    settings = {"weight_decay": 0.1}

    def optimiser(parameters):
        if kind == "sgd":
            return torch.optim.SGD(parameters, lr=1.0, momentum=0.9, **settings)
        return torch.optim.AdamW(parameters, lr=1.0, **settings)

    trained = {n: p for n, p in plain.named_parameters() if p.requires_grad}
    assert ("head.weight" in trained) is train_head
    reference, flat = optimiser(trained.values()), optimiser([net.flat])
    plain.train()
    for step in range(6):
        batch = task.batch("train", batch_ids(50, 16, 0, step))
        lr = lr_at(step, 6, 2, 1e-2)
        loss = train_step(net, task, batch, flat, lr=lr, grad_clip=0.5)
        reference.zero_grad()
        expected = nn.functional.cross_entropy(plain(batch["images"]), batch["labels"])
        expected.backward()
        nn.utils.clip_grad_norm_(trained.values(), 0.5)
        reference.param_groups[0]["lr"] = lr
        reference.step()
        torch.testing.assert_close(loss, expected.detach())
    for name, parameter in plain.named_parameters():
        if kind == "adamw" and name.endswith("k_proj.bias"):
            continue  # softmax does not see them: their gradient is rounding noise, which Adam scales up
        ours = net.module.get_parameter(name)
        torch.testing.assert_close(ours, parameter, rtol=1e-4, atol=2e-6)
        if name not in trained:
            assert torch.equal(ours, classifier(train_head).module.get_parameter(name))


def test_a_step_on_lines_is_that_of_transformers_loss(language):
    """transformers takes the mean over the tokens of the whole batch, however long each line is."""
    net, task = language
    batch = task.batch("train", torch.arange(7))
    expected = net(**batch).loss
    (gradient,) = torch.autograd.grad(expected, [net.module.model.embed_tokens.weight])
    loss = train_step(net, task, batch, torch.optim.SGD([net.flat]), lr=0.0)
    torch.testing.assert_close(loss, expected.detach())
    part = net.slices["model.embed_tokens.weight"]
    torch.testing.assert_close(
        net.flat.grad[part].view_as(gradient), gradient, rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("kind", ["images", "language"])
def test_parts_of_a_batch_sum_to_the_batch(kind: str, language):
    """Processes: each sees a part, one an empty one; what they sum is the whole batch's loss and gradient."""
    net, task = (classifier(), tiny_images()) if kind == "images" else language
    batch = task.batch("train", torch.arange(7))

    def gradient(part: slice, sums: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Of a part, in a world in which `reduce` gives the sums of all, in the order of its calls."""
        given = iter(sums)
        own = {n: t[part] for n, t in batch.items()}
        optimiser = torch.optim.SGD([net.flat])
        seen: list[torch.Tensor] = []

        def reduce(tensor: torch.Tensor) -> torch.Tensor:
            seen.append(tensor.clone())
            return next(given, tensor)

        train_step(net, task, own, optimiser, lr=0.0, reduce=reduce)
        return seen[0], torch.cat([seen[2].view(1), seen[1]])

    def run(*parts: slice) -> torch.Tensor:
        count = sum(gradient(part, [])[0] for part in parts)
        return sum(gradient(part, [count])[1] for part in parts)

    loss = train_step(net, task, batch, torch.optim.SGD([net.flat]), lr=0.0)
    whole = torch.cat([loss.view(1), net.flat.grad])
    parts = run(slice(0, 5), slice(5, 7), slice(7, 7))
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-6)


def test_gradients_do_not_add_up_over_steps():
    net, task = classifier(), tiny_images()
    optimiser = torch.optim.SGD([net.flat])
    batch = task.batch("train", torch.arange(4))
    train_step(net, task, batch, optimiser, lr=0.0)
    once = net.flat.grad.clone()
    train_step(net, task, batch, optimiser, lr=0.0)
    assert torch.equal(net.flat.grad, once)


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


def test_dropout_is_keyed_and_leaves_the_global_state():
    before = torch.get_rng_state()
    drawn = []
    for key in ((0, 1, 2), (0, 1, 2), (0, 1, 3)):
        with keyed_dropout(torch.device("cpu"), *key):
            drawn.append(torch.rand(3))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("batch_size", [1, 7, 100])
def test_scores_are_those_of_a_plain_loop(batch_size: int):
    net, task = classifier(), tiny_images()
    net.module.train()
    found = scores(net, task, "test", batch_size=batch_size)
    assert net.module.training
    net.module.eval()
    split = task.splits["test"]
    expected = [
        float(net(image[None])[0].argmax() == label)
        for image, label in zip(split.images, split.labels, strict=True)
    ]
    assert (found.dtype, found.tolist()) == (torch.float32, expected)
    assert 0 < sum(expected) < len(expected)

    for ids in ([9, 0, 9, 4], []):
        some = scores(net, task, "test", torch.tensor(ids, dtype=torch.int64), batch_size)
        assert some.tolist() == [expected[i] for i in ids]


def test_autocast_changes_scores_little(language):
    net, task = language
    full, half = (scores(net, task, "val", autocast=dtype) for dtype in (None, torch.bfloat16))
    assert half.dtype == torch.float32
    assert not torch.equal(half, full)
    torch.testing.assert_close(half, full, rtol=0.05, atol=0.05)
