"""The step against torch's own, schedules, the order of examples, scores."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from deltafl.errors import DeltaflError
from deltafl.models.pretrained import recompute_activations
from deltafl.seeding import keyed_generator
from deltafl.training.step import batches, keyed_dropout, lr_at, scores, train_step
from tiny_models import classifier


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
@pytest.mark.parametrize("train_head", [False, True])
def test_steps_are_those_of_torch_on_ordinary_parameters(kind: str, train_head: bool):
    """The reference shares no code but the network: mean cross-entropy, clip, optimiser on a list of parameters."""
    (net, task), plain = classifier(train_head), classifier(train_head)[0].module
    start = {n: p.detach().clone() for n, p in plain.named_parameters()}

    def optimiser(parameters):
        if kind == "sgd":
            return torch.optim.SGD(parameters, lr=1.0, momentum=0.9, weight_decay=0.1)
        return torch.optim.AdamW(parameters, lr=1.0, weight_decay=0.1)

    trained = {n: p for n, p in plain.named_parameters() if p.requires_grad}
    assert ("head.weight" in trained) is train_head
    reference, flat = optimiser(trained.values()), optimiser([net.flat])
    plain.train()
    for step, ids in enumerate(batches(torch.arange(50), 16, 0, 6)):
        batch, lr = task.batch("train", ids), lr_at(step, 6, 2, 1e-2)
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
        assert torch.equal(ours, start[name]) == (name not in trained), name


def test_a_step_on_lines_is_that_of_transformers_loss(language):
    """transformers takes the mean over the tokens of the whole batch, however long each line is."""
    net, task = language
    batch = task.batch("train", torch.arange(7))
    expected = net(**batch).loss
    (gradient,) = torch.autograd.grad(expected, [net.module.model.embed_tokens.weight])
    part = net.slices["model.embed_tokens.weight"]
    for _ in range(2):  # gradients do not add up over steps
        loss = train_step(net, task, batch, torch.optim.SGD([net.flat]), lr=0.0)
        torch.testing.assert_close(loss, expected.detach())
        ours = net.flat.grad[part].view_as(gradient)
        torch.testing.assert_close(ours, gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["images", "language"])
def test_parts_of_a_batch_sum_to_the_batch(kind: str, language):
    """Processes: each sees a part, one an empty one; what they sum is the whole batch's loss and gradient."""
    net, task = classifier() if kind == "images" else language
    batch = task.batch("train", torch.arange(7))

    def seen(part: slice, *sums: torch.Tensor) -> list[torch.Tensor]:
        """What a part gives to `reduce`, which answers with the sums of all, in the order of its calls."""
        given, found = iter(sums), []

        def reduce(tensor: torch.Tensor) -> torch.Tensor:
            found.append(tensor.clone())
            return next(given, tensor)

        own = {n: t[part] for n, t in batch.items()}
        train_step(net, task, own, torch.optim.SGD([net.flat]), lr=0.0, reduce=reduce)
        return found

    loss = train_step(net, task, batch, torch.optim.SGD([net.flat]), lr=0.0)
    whole = torch.cat([net.flat.grad, loss.view(1)])
    parts = slice(0, 5), slice(5, 7), slice(7, 7)
    count = sum(seen(part)[0] for part in parts)
    summed = sum(torch.cat([seen(p, count)[1], seen(p, count)[2].view(1)]) for p in parts)
    torch.testing.assert_close(summed, whole, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["images", "language"])
def test_a_step_in_small_parts_or_with_activations_computed_again_is_the_step(kind: str, language):
    """Also of lines, whose parts hold different numbers of tokens."""
    net, task = classifier() if kind == "images" else language
    batch, sizes = task.batch("train", torch.arange(7)), list[int]()

    def step(**options) -> torch.Tensor:
        loss = train_step(net, task, batch, torch.optim.SGD([net.flat]), lr=0.0, **options)
        return torch.cat([net.flat.grad, loss.view(1)])

    whole = step()
    handle = net.module.register_forward_pre_hook(
        lambda _, args, given: sizes.append(len(next(iter([*args, *given.values()])))),
        with_kwargs=True,
    )
    torch.testing.assert_close(step(micro=3), whole, rtol=1e-4, atol=1e-6)
    assert sizes == [3, 3, 1]
    handle.remove()
    layers = (net.module.encoder if kind == "images" else net.module.model).layers
    calls = list[int]()
    layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    recompute_activations(net.module)
    assert torch.equal(step(), whole)
    assert len(calls) == 2
    with pytest.raises(DeltaflError, match="Linear has no gradient checkpointing"):
        recompute_activations(nn.Linear(2, 2))


def test_schedules_are_those_of_torch():
    """After a warm-up of 2 steps that rises evenly; He et al. divide the rate by 10 at 1/2 and 3/4 of the steps."""
    of = torch.optim.lr_scheduler
    references = {
        "cosine": lambda o: of.CosineAnnealingLR(o, T_max=8),
        "constant": lambda o: of.ConstantLR(o, factor=1.0),
        "linear": lambda o: of.LinearLR(o, 1.0, 0.0, total_iters=8),
        "step": lambda o: of.MultiStepLR(o, milestones=[4, 6], gamma=0.1),
    }
    for schedule, make in references.items():
        optimiser = torch.optim.SGD([torch.zeros(1)], lr=3.0)
        reference = make(optimiser)
        assert [lr_at(s, 10, 2, 3.0, schedule) for s in (0, 1)] == [1.5, 3.0]
        for step in range(8):
            expected = pytest.approx(optimiser.param_groups[0]["lr"])
            assert lr_at(step + 2, 10, 2, 3.0, schedule) == expected, (schedule, step)
            optimiser.step()
            reference.step()


@pytest.mark.parametrize("alike", [False, True])
@pytest.mark.parametrize(("count", "size"), [(50, 16), (48, 16), (5, 16)])
def test_an_epoch_is_a_permutation_and_a_batch_a_function_of_its_step(count, size, alike):
    ids, per_epoch = torch.arange(count) * 3 + 1, math.ceil(count / size)
    lengths = torch.arange(3 * count + 1) % 7 if alike else None
    drawn = list(batches(ids, size, 3, 3 * per_epoch, "client 2", lengths=lengths))
    epochs = [torch.cat(drawn[e * per_epoch : (e + 1) * per_epoch]) for e in range(3)]
    assert all(torch.equal(order.sort().values, ids) for order in epochs)
    others = [next(batches(ids, size, 4, 1, "client 2")), next(batches(ids, size, 3, 1))]
    assert not any(torch.equal(other, drawn[0]) for other in others)
    assert not torch.equal(epochs[0], epochs[1])
    for first in range(3 * per_epoch):
        for steps in (first + 1, 3 * per_epoch):
            part = list(batches(ids, size, 3, steps, "client 2", first, lengths))
            assert len(part) == steps - first
            assert all(map(torch.equal, part, drawn[first:steps]))


def test_a_batch_holds_examples_of_like_length_and_an_epoch_all_lengths():
    lengths = torch.randint(1, 500, (1000,), generator=torch.Generator().manual_seed(0))
    drawn = [lengths[rows] for rows in batches(torch.arange(1000), 8, 0, 125, lengths=lengths)]
    plain = [lengths[rows] for rows in batches(torch.arange(1000), 8, 0, 125)]
    padded, before = (sum(len(own) * int(own.max()) for own in e) for e in (drawn, plain))
    assert padded < 1.1 * lengths.sum() < before / 1.5
    # Short and long ones are mixed: no run of 20 batches is far from the mean.
    means = torch.tensor([own.float().mean() for own in drawn])
    assert (means.unfold(0, 20, 1).mean(1) / lengths.float().mean() - 1).abs().max() < 0.5
    assert means.std() > 100


def test_scores_of_language_are_in_the_order_of_the_examples(language):
    net, task = language
    expected = [scores(net, task, "train", torch.tensor([i])) for i in range(9)]
    found = scores(net, task, "train", torch.arange(9), batch_size=4)
    torch.testing.assert_close(found, torch.cat(expected), rtol=1e-5, atol=1e-5)
    shuffled = torch.tensor([5, 0, 5, 8])
    torch.testing.assert_close(scores(net, task, "train", shuffled, 3), found[shuffled])


def test_generators_and_dropout_are_keyed_and_the_global_state_stays():
    keys = [(1, "a"), (1, "b"), (2, "a"), (1, "a", 0), ("1", "a"), (1, "a")]
    found = [torch.rand((), generator=keyed_generator(*key)).item() for key in keys]
    assert len(set(found)) == 5
    before, drawn = torch.get_rng_state(), []
    for key in ((0, 1, 2), (0, 1, 2), (0, 1, 3)):
        with keyed_dropout(torch.device("cpu"), *key):
            drawn.append(torch.rand(3))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("batch_size", [1, 7, 100])
def test_scores_are_those_of_a_plain_loop(batch_size: int):
    net, task = classifier()
    net.module.train()
    found = scores(net, task, "test", batch_size=batch_size)
    assert not net.module.training
    split = task.splits["test"]
    expected = np.array([int(net(image[None])[0].argmax()) for image in split.images])
    expected = (expected == split.labels.numpy()).astype(float).tolist()
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
