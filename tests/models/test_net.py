"""A `Net`: one vector, the names of files, saving, and what of it trains; for images and language."""

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from checkpoint_files import fails
from deltafl.errors import DeltaflError
from deltafl.models import HeadRecipe, Net, load_net
from deltafl.tasks import ImageInput
from tiny_models import classifier, own_net, tiny_net


@pytest.mark.parametrize("make", [tiny_net, lambda: load_net("tiny_models:tied_net"), own_net])
def test_parameters_and_gradients_are_views_of_one_vector(make):
    net, plain = make(), make()
    plain.load(net.module.state_dict())
    inputs = torch.randint(0, 256, (4, 1, 8, 8), dtype=torch.uint8)

    def run(net):
        if module := getattr(net.module, "features", None):
            return module(inputs)
        return net(net.inputs.normalise(inputs))

    values = [p.detach().clone() for p in net.module.parameters() if p.requires_grad]
    assert torch.equal(net.flat.detach(), torch.cat([p.reshape(-1) for p in values]))
    assert list(net.trained) == list(net.slices)
    run(net).square().sum().backward()
    run(plain).square().sum().backward()
    gradients = [p.grad for p in plain.module.parameters() if p.requires_grad]
    expected = [
        torch.zeros_like(p) if g is None else g for p, g in zip(values, gradients, strict=True)
    ]
    assert torch.equal(net.flat.grad, torch.cat([g.reshape(-1) for g in expected]))
    with torch.no_grad():
        net.flat.add_(1)
    moved = [p for p in net.module.parameters() if p.requires_grad]
    assert all(torch.equal(p, v + 1) for p, v in zip(moved, values, strict=True))


def test_values_load_by_names_of_the_module_or_of_files(tmp_path):
    other = tiny_net(1)
    other.save(tmp_path)
    by_file = load_file(tmp_path / "model.safetensors")
    assert any("attention.attention.query" in name for name in by_file)
    prefixed = {f"vit.{n}": t for n, t in by_file.items()}
    for tensors in (by_file, other.module.state_dict(), prefixed):
        net = tiny_net()
        rest = net.load({**tensors, "pooler.dense.weight": torch.zeros(1)})
        assert rest == ("pooler.dense.weight",)
        assert torch.equal(net.flat, other.flat)


def test_a_head_is_not_taken_from_a_tensor_of_the_same_name():
    net, _ = classifier()
    encoder = net.module.encoder
    encoder.head = torch.nn.Linear(2, 2)  # the files call its weight head.weight
    before = net.module.head.weight.clone()
    given = {name: tensor + 1 for name, tensor in encoder.state_dict().items()}
    assert net.load(given) == ()
    assert all(torch.equal(t, given[n]) for n, t in encoder.state_dict().items())
    assert torch.equal(net.module.head.weight, before)
    del encoder.head
    assert net.load(given) == ("head.weight", "head.bias")


def test_nets_that_share_their_weights_have_heads_of_their_own():
    net, task = classifier()
    other = net.sharing()
    other.prepare(task, HeadRecipe(head="probe"))
    given = {n: t + 1 for n, t in net.module.encoder.state_dict().items()}
    net.load(given)
    ours, theirs = net.module.state_dict(), other.module.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert (tensor.data_ptr() == theirs[name].data_ptr()) is not name.startswith("head.")


def test_buffers_are_part_of_the_state():
    net = load_net("tiny_models:Convolution")
    assert {"encoder.norm.running_mean", "encoder.norm.running_var"} < net.state().keys()
    assert "encoder.norm.num_batches_tracked" not in net.state()
    assert net.load({n: torch.full_like(t, 3) for n, t in net.module.state_dict().items()}) == ()
    assert all((t == 3).all() for t in net.module.state_dict().values())


def test_a_copy_is_independent_and_something_must_train():
    net = tiny_net()
    twin = net.copy_to("cpu")
    assert torch.equal(twin.flat, net.flat)
    with torch.no_grad():
        net.flat.zero_()
    assert twin.flat.any()
    frozen = tiny_net()
    frozen.module.requires_grad_(False)
    with pytest.raises(DeltaflError, match="what trains must be of one dtype on one device, not"):
        assert frozen.flat is None


def test_loading_refuses_what_does_not_fit_and_changes_nothing():
    net, _ = classifier()
    before = net.flat.detach().clone()
    given = {n: t.clone() + 1 for n, t in net.trained.items()}
    name = next(iter(given))
    fails("the model needs", lambda: net.load({n: t for n, t in given.items() if n != name}))
    fails("the model has", net.load, given | {name: torch.zeros(1)})
    assert torch.equal(net.flat, before)


def test_tensors_of_several_blocks_load_whole_and_their_memory_can_be_freed():
    """A block holds 2^18 elements; a transposed weight is no contiguous one."""
    net = Net(nn.Sequential(nn.Linear(700, 600), nn.Linear(600, 700)), ImageInput(1))
    net.module[1].weight = nn.Parameter(torch.zeros(600, 700).T)
    given = {n: torch.randn(t.shape) for n, t in net.module.state_dict().items()}
    net.load(given)
    assert all(torch.equal(t, given[n]) for n, t in net.module.state_dict().items())
    net.empty(["0.weight", "1.bias"])
    for name, tensor in net.module.state_dict().items():
        freed = tensor.untyped_storage().nbytes() == 4
        assert freed is (name in ("0.weight", "1.bias"))
        assert tensor.shape == given[name].shape
