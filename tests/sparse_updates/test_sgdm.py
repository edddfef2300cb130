import itertools

import pytest
import torch
from torch import nn

from deltafl.algebra.tensors import BLOCK
from deltafl.models import HeadRecipe, Net
from deltafl.sparse.eligible import eligible
from deltafl.sparse.masks import completed
from deltafl.sparse.packed import kept_index
from deltafl.sparse.sgdm import SparseSGDM, frozen_tensors
from deltafl.tasks import ImageInput
from deltafl.training.step import train_step
from tiny_models import tiny_images, tiny_net

COMBINATIONS = [
    {"momentum": m, "weight_decay": wd, "nesterov": n}
    for m, wd, n in itertools.product((0.0, 0.9), (0.0, 0.1), (False, True))
    if m or not n
]


def random_mask(model: Net, density: float, seed: int = 0):
    draw = torch.Generator().manual_seed(seed)
    return {n: torch.rand(t.shape, generator=draw) < density for n, t in model.trained.items()}


def flat_mask(mask) -> torch.Tensor:
    return torch.cat([m.reshape(-1) for m in mask.values()])


def large() -> Net:
    """One weight of more than a block, so that blocks of every kind are met."""
    module = nn.Sequential(nn.Flatten(), nn.Linear(64, 2), nn.Linear(2, (BLOCK + 100) // 2))
    with torch.no_grad():
        for i, parameter in enumerate(module.parameters()):
            parameter.normal_(generator=torch.Generator().manual_seed(i))
    return Net(module, ImageInput(8, 1, (0.5,), (0.5,)))


def small(train_head: bool = False) -> Net:
    net = tiny_net()
    net.prepare(tiny_images(), HeadRecipe(head="linear", train_head=train_head))
    return net


def sgdm(net: Net, mask, lr: float = 0.1, **options) -> SparseSGDM:
    index = None if mask is None else kept_index(mask, net.slices)
    return SparseSGDM(net.flat, index, lr, **options)


def whole_batch():
    task = tiny_images()
    return task, task.batch("train", torch.arange(task.size("train")))


def set_gradient(model: Net, seed: int) -> torch.Tensor:
    gradient = torch.randn(model.flat.shape, generator=torch.Generator().manual_seed(seed))
    model.flat.grad.copy_(gradient)
    return gradient


def torch_sgd(weights: torch.Tensor, gradients, lr: float, **options) -> torch.Tensor:
    parameter = nn.Parameter(weights.clone())
    optimiser = torch.optim.SGD([parameter], lr, foreach=False, **options)
    for gradient in gradients:
        parameter.grad = gradient.clone()
        optimiser.step()
    return parameter.detach()


@pytest.mark.parametrize("options", COMBINATIONS, ids=str)
@pytest.mark.parametrize("given", ["none", "ones"])
def test_a_mask_of_ones_is_torchs_sgd_bit_for_bit(options, given):
    model = small()
    start = model.flat.detach().clone()
    mask = None if given == "none" else random_mask(model, 2.0)
    optimiser = sgdm(model, mask, **options)
    gradients = []
    for step in range(4):
        gradients.append(set_gradient(model, step))
        optimiser.step()
        assert torch.equal(model.flat.grad, gradients[-1])
    assert torch.equal(model.flat.detach(), torch_sgd(start, gradients, 0.1, **options))


@pytest.mark.parametrize("options", COMBINATIONS, ids=str)
@pytest.mark.parametrize("make", [small, large])
def test_kept_coordinates_are_torchs_sgd_and_frozen_ones_stay(options, make):
    """The reference trains the kept coordinates as a vector of their own."""
    model = make()
    mask = random_mask(model, 0.3)
    if make is large:
        mask["2.weight"][: BLOCK // 2 + 10] = True  # a block kept whole
    kept = flat_mask(mask)
    start = model.flat.detach().clone()
    optimiser = sgdm(model, mask, **options)
    gradients = []
    for step in range(4):
        gradients.append(set_gradient(model, step))
        optimiser.step()
    expected = torch_sgd(start[kept], [g[kept] for g in gradients], 0.1, **options)
    assert torch.equal(model.flat.detach()[kept], expected)
    assert torch.equal(model.flat.detach()[~kept], start[~kept])
    assert not torch.equal(expected, start[kept])


def test_training_moves_kept_coordinates_only():
    """A whole run through train_step with momentum, Nesterov and weight decay; the head trains densely."""
    net, (task, batch) = small(train_head=True), whole_batch()
    mask = random_mask(net, 0.1)
    mask = completed({n: mask[n] for n in eligible(net)}, net)
    kept, start = flat_mask(mask), net.flat.detach().clone()
    optimiser = sgdm(net, mask, weight_decay=0.1, nesterov=True)
    losses = [float(train_step(net, task, batch, optimiser, lr=0.05)) for _ in range(20)]
    assert torch.equal(net.flat.detach()[~kept], start[~kept])
    assert (net.flat.detach()[kept] != start[kept]).float().mean() > 0.5
    assert losses[-1] < losses[0]
    assert not torch.equal(net.trained["head.weight"], start[net.slices["head.weight"]].view(3, 16))


@pytest.mark.parametrize("make", [small, large])
@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
def test_mask_gradients(make, density):
    model = make()
    mask = random_mask(model, density)
    next(iter(mask.values())).view(-1)[0] = True
    optimiser = sgdm(model, mask, 0.1)
    gradient = set_gradient(model, 0)
    gradient[3] = model.flat.grad[3] = torch.inf
    optimiser.mask_gradients_()
    expected = torch.where(flat_mask(mask), gradient, 0)
    assert torch.equal(model.flat.grad, expected)
    assert torch.equal(
        nn.utils.get_total_norm([model.flat.grad]), nn.utils.get_total_norm([expected])
    )


def test_memory_falls_with_sparsity():
    """At 90 % sparsity the momentum is 10 % of the dense one, and the index as much again."""
    net = large()
    numel = net.flat.numel()
    mask = random_mask(net, 0.1)
    optimiser = sgdm(net, mask)
    set_gradient(net, 0)
    optimiser.step()
    count = int(flat_mask(mask).sum())
    assert optimiser.buffer.nbytes == 4 * count < 0.11 * 4 * numel
    assert optimiser.index.nbytes == 4 * count


def test_tensors_without_a_kept_coordinate_have_no_gradient_for_a_while():
    net, (task, batch) = small(), whole_batch()
    mask = random_mask(net, 0.5)
    gone = tuple(n for n in mask if n.endswith(("projection.weight", "layers.0.mlp.fc1.weight")))
    for name in gone:
        mask[name].zero_()
    parameters = dict(net.module.named_parameters())
    before = {n: p.requires_grad for n, p in parameters.items()}
    start = net.flat.detach().clone()
    optimiser = sgdm(net, mask, weight_decay=0.1)
    set_gradient(net, 0)
    with frozen_tensors(net.module, mask) as names:
        assert names == gone
        assert {n for n, p in parameters.items() if before[n] and not p.requires_grad} == set(gone)
        for _ in range(3):
            assert not any(net.flat.grad[net.slices[n]].any() for n in gone)
            train_step(net, task, batch, optimiser, lr=0.1)
            assert net.flat.grad.any()
    assert {n: p.requires_grad for n, p in parameters.items()} == before
    assert all(torch.equal(net.flat.data[net.slices[n]], start[net.slices[n]]) for n in gone)
    train_step(net, task, batch, optimiser, lr=0.1)
    assert all(net.flat.grad[net.slices[n]].any() for n in gone)


def test_skipping_gives_the_bits_of_not_skipping_and_is_undone_after_an_error():
    results = []
    for skip in (False, True):
        net, (task, batch) = small(), whole_batch()
        mask = random_mask(net, 0.5)
        mask["encoder.layers.0.mlp.fc1.weight"].zero_()
        optimiser = sgdm(net, mask)
        with frozen_tensors(net.module, mask if skip else {}):
            for _ in range(3):
                train_step(net, task, batch, optimiser, lr=0.1)
        results.append(net.flat.detach())
    assert torch.equal(*results)
    with pytest.raises(ValueError, match="inside"), frozen_tensors(net.module, mask):
        raise ValueError("inside")
    assert net.module.get_parameter("encoder.layers.0.mlp.fc1.weight").requires_grad
