import itertools

import pytest
import torch
from torch import nn

from deltafl.algebra.tensors import BLOCK
from deltafl.models import Net
from deltafl.sparse.packed import kept_index
from deltafl.sparse.sgdm import SparseSGDM
from deltafl.tasks import ImageInput
from tiny_models import classifier

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


def sgdm(net: Net, mask, lr: float = 0.1, **options) -> SparseSGDM:
    index = None if mask is None else kept_index(mask, net.slices)
    return SparseSGDM(net.flat, index, lr, **options)


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
@pytest.mark.parametrize("make", [lambda: classifier()[0], large])
@pytest.mark.parametrize("density", [None, 0.1, 2.0])
def test_kept_coordinates_are_torchs_sgd_bit_for_bit_and_frozen_ones_stay(options, make, density):
    """The reference trains the kept coordinates, or all, as a vector of their own; so large is the state."""
    model = make()
    mask = random_mask(model, density or 2.0)
    if make is large:
        mask["2.weight"][: BLOCK // 2 + 10] = True  # a block kept whole
    kept = flat_mask(mask)
    start = model.flat.detach().clone()
    optimiser = sgdm(model, mask if density else None, **options)
    gradients = []
    for step in range(4):
        gradients.append(set_gradient(model, step))
        optimiser.gather()
        optimiser.step()
        assert torch.equal(model.flat.grad, gradients[-1])
    expected = torch_sgd(start[kept], [g[kept] for g in gradients], 0.1, **options)
    assert torch.equal(model.flat.detach()[kept], expected)
    assert torch.equal(model.flat.detach()[~kept], start[~kept])
    assert not torch.equal(expected, start[kept])
    held = [len(buffer) for buffer in optimiser.buffers if buffer is not None]
    assert held == ([int(kept.sum())] if options["momentum"] else [])
