import copy
import itertools

import pytest
import torch
from torch import nn

from deltafl.algebra.tensors import BLOCK
from deltafl.errors import DeltaflError
from deltafl.models.encoder import InputSpec, LoadedEncoder
from deltafl.models.flat import FlatModel
from deltafl.sparse.sgdm import SparseSGDM
from deltafl.training.legacy import Batch, train_step
from tiny_models import tiny_head, tiny_task, tiny_vit

COMBINATIONS = [
    {"momentum": m, "weight_decay": wd, "dampening": d, "nesterov": n}
    for m, wd, d, n in itertools.product((0.0, 0.9), (0.0, 0.1), (0.0, 0.3), (False, True))
    if not (n and (m == 0 or d != 0))
]


def random_mask(model: FlatModel, density: float, seed: int = 0):
    draw = torch.Generator().manual_seed(seed)
    return {n: torch.rand(t.shape, generator=draw) < density for n, t in model.tensors().items()}


def flat_mask(mask) -> torch.Tensor:
    return torch.cat([m.reshape(-1) for m in mask.values()])


def large() -> FlatModel:
    """One weight of more than a block, so that blocks of every kind are met."""
    module = nn.Sequential(nn.Flatten(), nn.Linear(64, 2), nn.Linear(2, (BLOCK + 100) // 2))
    with torch.no_grad():
        for i, parameter in enumerate(module.parameters()):
            parameter.normal_(generator=torch.Generator().manual_seed(i))
    return FlatModel(
        LoadedEncoder(module, nn.Module.__call__, InputSpec(8, 1, (0.5,), (0.5,)), 2, "large")
    )


def small() -> FlatModel:
    return FlatModel(tiny_vit())


def set_gradient(model: FlatModel, seed: int) -> torch.Tensor:
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
    optimiser = SparseSGDM(model, mask, 0.1, **options)
    gradients = []
    for step in range(4):
        gradients.append(set_gradient(model, step))
        optimiser.step()
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
    optimiser = SparseSGDM(model, mask, 0.1, **options)
    gradients = []
    for step in range(4):
        gradients.append(set_gradient(model, step))
        optimiser.step()
    expected = torch_sgd(start[kept], [g[kept] for g in gradients], 0.1, **options)
    assert torch.equal(model.flat.detach()[kept], expected)
    assert torch.equal(model.flat.detach()[~kept], start[~kept])
    assert not torch.equal(expected, start[kept])


def test_the_formula_in_float64():
    model = small()
    mask = random_mask(model, 0.4)
    kept = flat_mask(mask)
    w = model.flat.detach().double()[kept]
    lr, mu, damp, wd = 0.05, 0.8, 0.2, 0.1
    optimiser = SparseSGDM(model, mask, lr, momentum=mu, dampening=damp, weight_decay=wd)
    m = None
    for step in range(6):
        d = set_gradient(model, step).double()[kept] + wd * w
        m = d if m is None else mu * m + (1 - damp) * d
        w = w - lr * m
        optimiser.step()
    torch.testing.assert_close(model.flat.detach()[kept].double(), w, rtol=1e-5, atol=1e-6)


def test_training_moves_kept_coordinates_only():
    """A whole run through train_step with momentum, Nesterov and weight decay; the head trains densely."""
    model, task, head = small(), tiny_task(), tiny_head().trainable()
    mask = random_mask(model, 0.1)
    kept = flat_mask(mask)
    start, head_start = model.flat.detach().clone(), head.weight.detach().clone()
    optimiser = SparseSGDM(
        model, mask, 0.1, weight_decay=0.1, nesterov=True, extra=head.parameters()
    )
    batch = Batch(task.train.images, task.train.labels)
    losses = [float(train_step(model, head, batch, optimiser, lr=0.05)) for _ in range(20)]
    assert torch.equal(model.flat.detach()[~kept], start[~kept])
    assert (model.flat.detach()[kept] != start[kept]).float().mean() > 0.5
    assert losses[-1] < losses[0]
    assert not torch.equal(head.weight.detach(), head_start)


def test_extra_tensors_are_torchs_sgd():
    model, head = (
        small(),
        nn.Parameter(torch.randn(5, 3, generator=torch.Generator().manual_seed(0))),
    )
    start = head.detach().clone()
    options = {"momentum": 0.9, "weight_decay": 0.1, "nesterov": True}
    optimiser = SparseSGDM(model, random_mask(model, 0.1), 0.1, extra=[head], **options)
    gradients = [torch.randn(5, 3, generator=torch.Generator().manual_seed(i)) for i in range(1, 4)]
    for gradient in gradients:
        head.grad = gradient.clone()
        optimiser.step()
    assert torch.equal(head.detach(), torch_sgd(start, gradients, 0.1, **options))


def test_the_gradient_is_not_modified_by_a_step():
    model = small()
    optimiser = SparseSGDM(model, random_mask(model, 0.3), 0.1, weight_decay=0.1, nesterov=True)
    gradient = set_gradient(model, 0)
    optimiser.step()
    optimiser.step()
    assert torch.equal(model.flat.grad, gradient)


@pytest.mark.parametrize("make", [small, large])
@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
def test_mask_gradients(make, density):
    model = make()
    mask = random_mask(model, density)
    next(iter(mask.values())).view(-1)[0] = True
    optimiser = SparseSGDM(model, mask, 0.1)
    gradient = set_gradient(model, 0)
    gradient[3] = model.flat.grad[3] = torch.inf
    optimiser.mask_gradients_()
    expected = torch.where(flat_mask(mask), gradient, 0)
    assert torch.equal(model.flat.grad, expected)
    assert torch.equal(
        nn.utils.get_total_norm([model.flat.grad]), nn.utils.get_total_norm([expected])
    )


def test_memory_falls_with_sparsity():
    """At 90 % sparsity: 10 % of the dense momentum, at most 14 % with the index, whose bits are 1/32 of float32."""
    model = large()
    dense = torch.optim.SGD([model.flat], 0.1, momentum=0.9)
    set_gradient(model, 0)
    dense.step()
    dense_bytes = sum(t.nbytes for t in dense.state[model.flat].values())
    numel = model.flat.numel()
    assert dense_bytes == 4 * numel
    mask = random_mask(model, 2.0)
    order = torch.randperm(numel, generator=torch.Generator().manual_seed(0))
    keep = torch.zeros(numel, dtype=torch.bool)
    keep[order[: numel // 10]] = True
    mask = {n: keep[part].view(mask[n].shape) for n, part in model.slices.items()}
    optimiser = SparseSGDM(model, mask, 0.1)
    assert optimiser.num_bytes.values == 0
    optimiser.step()
    held = [
        t
        for state in optimiser.state.values()
        for t in state.values()
        if isinstance(t, torch.Tensor)
    ]
    assert sum(t.nbytes for t in held) == optimiser.num_bytes.values == 4 * (numel // 10)
    assert sum(optimiser.num_bytes) <= 0.14 * dense_bytes
    assert optimiser.num_bytes.index >= numel // 8


def test_tensors_without_a_kept_coordinate_have_no_gradient_for_a_while():
    model, task, head = small(), tiny_task(), tiny_head()
    mask = random_mask(model, 0.5)
    gone = ("embeddings.patch_embeddings.projection.weight", "layers.0.mlp.fc1.weight")
    for name in gone:
        mask[name].zero_()
    parameters = dict(model.module.named_parameters())
    before = {n: p.requires_grad for n, p in parameters.items()}
    start = model.flat.detach().clone()
    optimiser = SparseSGDM(model, mask, 0.1, weight_decay=0.1)
    assert optimiser.frozen == gone
    set_gradient(model, 0)
    batch = Batch(task.train.images, task.train.labels)
    with optimiser.skip_frozen() as names:
        assert names == gone
        assert {n for n, p in parameters.items() if before[n] and not p.requires_grad} == set(gone)
        assert not any(model.flat.grad[model.slices[n]].any() for n in gone)
        for _ in range(3):
            train_step(model, head, batch, optimiser, lr=0.1)
            assert not any(model.flat.grad[model.slices[n]].any() for n in gone)
            assert model.flat.grad.any()
    assert {n: p.requires_grad for n, p in parameters.items()} == before
    assert all(
        torch.equal(model.flat.detach()[model.slices[n]], start[model.slices[n]]) for n in gone
    )
    train_step(model, head, batch, optimiser, lr=0.1)
    assert all(model.flat.grad[model.slices[n]].any() for n in gone)


def test_skipping_gives_the_bits_of_not_skipping():
    results = []
    for skip in (False, True):
        model, task, head = small(), tiny_task(), tiny_head()
        mask = random_mask(model, 0.5)
        mask["layers.0.mlp.fc1.weight"].zero_()
        optimiser = SparseSGDM(model, mask, 0.1)
        batch = Batch(task.train.images, task.train.labels)
        for _ in range(3):
            if skip:
                with optimiser.skip_frozen():
                    train_step(model, head, batch, optimiser, lr=0.1, grad_clip=None)
            else:
                train_step(model, head, batch, optimiser, lr=0.1, grad_clip=None)
        results.append(model.flat.detach())
    assert torch.equal(*results)


def test_requires_grad_is_restored_after_an_error():
    model = small()
    mask = random_mask(model, 0.5)
    mask["layernorm.bias"].zero_()
    optimiser = SparseSGDM(model, mask, 0.1)

    def fail():
        with optimiser.skip_frozen():
            raise ValueError("inside")

    with pytest.raises(ValueError, match="inside"):
        fail()
    assert dict(model.module.named_parameters())["layernorm.bias"].requires_grad


@pytest.mark.parametrize("density", [0.2, 2.0])
def test_resume_is_bit_exact(density):
    def steps(model, optimiser, numbers):
        for step in numbers:
            set_gradient(model, step)
            optimiser.step()

    options = {"lr": 0.1, "momentum": 0.9, "dampening": 0.2, "weight_decay": 0.1}
    whole, first, second = small(), small(), small()
    mask = random_mask(whole, density)
    uninterrupted = SparseSGDM(whole, mask, **options)
    steps(whole, uninterrupted, range(6))

    before = SparseSGDM(first, mask, **options)
    steps(first, before, range(3))
    saved = copy.deepcopy(before.state_dict())
    second.load(first.tensors())
    after = SparseSGDM(second, mask, **options)
    given = copy.deepcopy(saved)
    after.load_state_dict(given)
    steps(second, after, range(3, 6))
    assert torch.equal(second.flat.detach(), whole.flat.detach())
    assert torch.equal(given["state"][0]["momentum_buffer"], saved["state"][0]["momentum_buffer"])


def test_a_state_of_another_mask_is_refused():
    model = small()
    one, two = (
        SparseSGDM(model, random_mask(model, 0.5, 1), 0.1),
        SparseSGDM(model, random_mask(model, 0.5, 2), 0.1),
    )
    with pytest.raises(DeltaflError, match="another mask"):
        two.load_state_dict(one.state_dict())
    with pytest.raises(DeltaflError, match="another mask"):
        SparseSGDM(model, None, 0.1).load_state_dict(one.state_dict())


def test_reset_is_a_new_optimiser_in_the_same_memory():
    model, fresh = small(), small()
    mask = random_mask(model, 0.3)
    optimiser = SparseSGDM(model, mask, 0.1, dampening=0.3)
    set_gradient(model, 0)
    optimiser.step()
    buffer = optimiser.state[model.flat]["momentum_buffer"]
    fresh.load(model.tensors())
    optimiser.reset()
    other = SparseSGDM(fresh, mask, 0.1, dampening=0.3)
    for step in range(1, 4):
        set_gradient(model, step)
        set_gradient(fresh, step)
        optimiser.step()
        other.step()
    assert torch.equal(model.flat.detach(), fresh.flat.detach())
    assert optimiser.state[model.flat]["momentum_buffer"] is buffer


def test_a_closure_is_called_with_gradients():
    model = small()
    optimiser = SparseSGDM(model, None, 0.1)
    assert optimiser.step(lambda: float(torch.is_grad_enabled())) == 1.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "none may be negative"),
        ({"lr": 0.1, "weight_decay": -1.0}, "none may be negative"),
        ({"lr": 0.1, "momentum": 0.0, "nesterov": True}, "Nesterov"),
        ({"lr": 0.1, "dampening": 0.1, "nesterov": True}, "Nesterov"),
    ],
)
def test_mistakes_are_named(options, message):
    with pytest.raises(DeltaflError, match=message):
        SparseSGDM(small(), None, **options)


def test_a_mask_that_does_not_fit_never_trains_densely():
    model = small()
    mask = random_mask(model, 0.5)
    with pytest.raises(DeltaflError, match="mask and model differ"):
        SparseSGDM(model, {f"vit.{n}": m for n, m in mask.items()}, 0.1)
    with pytest.raises(DeltaflError, match="mask and model differ"):
        SparseSGDM(model, {}, 0.1)
    with pytest.raises(DeltaflError, match="keeps no coordinate"):
        SparseSGDM(model, {n: torch.zeros_like(m) for n, m in mask.items()}, 0.1)
