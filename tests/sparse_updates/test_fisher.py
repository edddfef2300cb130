"""Scores against vmap and against ordinary autograd in float64, for layers of every kind."""

import logging

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from deltafl.errors import DeltaflError
from deltafl.models import Net
from deltafl.sparse.eligible import trained
from deltafl.sparse.fisher import FisherScorer, FisherSum
from deltafl.sparse.per_example import find_layers
from deltafl.tasks import ImageInput, load_task
from deltafl.tasks.recipe import DataRecipe
from deltafl.tasks.task import Batch, Task, drawn
from tiny_models import tiny_images, tiny_llama, tiny_net, write_lines

DRAW = torch.Generator().manual_seed(0)
PIXELS = torch.rand(50, 1, 8, 8, dtype=torch.float64, generator=DRAW) * 2 - 1
LABELS = torch.arange(50) % 3
IDS = torch.tensor([3, 0, 17, 8, 41, 20, 5])


class Pixels(Task):
    """Classification of float64 images, in float64."""

    name = "pixels"

    def size(self, split):
        return len(LABELS)

    def batch(self, split, ids, device="cpu", generator=None):
        return {"x": PIXELS[ids], "labels": LABELS[ids]}

    def loss(self, model, batch):
        losses = F.cross_entropy(model(batch["x"]), batch["labels"], reduction="none")
        return losses, torch.ones_like(losses)

    def score(self, model, batch):
        return -self.loss(model, batch)[0]

    def sampled(self, model, batch, generator):
        return {**batch, "labels": drawn(model(batch["x"]).softmax(1), generator)}

    def fingerprint(self):
        return ""


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(64, 12), nn.BatchNorm1d(12)
        self.second = nn.Linear(12, 16, bias=False)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.relu(self.norm(self.first(x.flatten(1)))))


class Depthwise(nn.Module):
    """As MobileNet: padded by hand, in-place activations, a strided and a dilated convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, stride=2, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.depth = nn.Conv2d(4, 8, 3, groups=4, padding=2, dilation=2)
        self.point = nn.Conv2d(8, 6, 1)
        self.group = nn.GroupNorm(2, 6)
        self.same = nn.Conv2d(6, 16, 2, padding="same", padding_mode="circular", groups=2)
        for buffer in (self.norm.running_mean, self.norm.running_var):
            assert buffer is not None
            buffer.uniform_(0.5, 1.5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self.norm(self.stem(F.pad(x, (0, 1, 0, 1)))), inplace=True)
        return self.same(self.group(self.point(self.depth(x)))).mean((2, 3))


class Words(nn.Module):
    """Pixels as words, repeated within an image, one of them padding; their places are embedded too."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.norm = nn.Embedding(9, 6, padding_idx=2), nn.LayerNorm(6)
        self.places, self.out = nn.Embedding(8, 6), nn.Linear(6, 16)

    def forward(self, x: Tensor) -> Tensor:
        words = (x.detach() * 4 + 4).long().clamp(0, 8)
        places = self.places(torch.arange(8)[None])
        return self.out(self.norm(self.table(words[:, 0]) + places)).tanh().mean((1, 2))


class Scale(nn.Module):
    """No rule knows it: DINOv2's layer scale, Llama's norm, a convolution in time."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.rand(8))
        self.across = nn.Conv1d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return (self.across(x * self.gain).mT * self.gain).mT


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale, self.out = Scale(), nn.Linear(8, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.scale(x[:, 0])).mean(1)


class Shared(nn.Module):
    """A layer called twice, one with tokens in the batch dimension, a weight used twice, a tied one."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.flat, self.out = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 16)
        self.scale, self.alone = nn.Parameter(torch.rand(8)), nn.Linear(8, 8)
        self.norm, self.tied = nn.LayerNorm(8), nn.Linear(8, 8)
        self.twin = nn.Linear(8, 8)
        self.twin.weight = self.tied.weight

    def forward(self, x: Tensor) -> Tensor:
        rows = self.norm(self.norm(self.twice(self.twice(x[:, 0]).tanh()).tanh()))
        rows = self.flat(rows.flatten(0, 1)).view_as(rows) * self.scale
        rows = self.twin(self.tied(rows).tanh())
        return self.out((self.alone(rows).tanh() @ self.alone.weight).mean(1))


class Transposed(nn.Module):
    """Eight tokens first, then the batch: with eight images the dimensions look alike."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.out = nn.Linear(8, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.mix(x[:, 0].transpose(0, 1)).tanh().mean(0))


class Untraceable(Mlp):
    """vmap cannot follow what depends on values."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = Gate()

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.gate(x))


class Gate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(1, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gain if float(x.detach().sum()) > 1e9 else x * self.gain * 0.5


class Classes(nn.Module):
    """An encoder and the fixed head of three classes, in float64."""

    def __init__(self, encoder: nn.Module, dim: int = 16) -> None:
        super().__init__()
        self.encoder = encoder
        draw = torch.Generator().manual_seed(5)
        self.register_buffer("pull", torch.randn(3, dim, generator=draw) / 10)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(x) @ self.pull.mT


class Vision(nn.Module):
    def __init__(self, module: nn.Module, pick) -> None:
        super().__init__()
        self.module, self.pick = module, pick

    def forward(self, x: Tensor) -> Tensor:
        return self.pick(self.module(pixel_values=x))


def vision(kind: str) -> nn.Module:
    import transformers as t

    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    size |= {"image_size": 8, "patch_size": 4, "num_channels": 1}
    if kind == "clip":
        config = t.CLIPVisionConfig(intermediate_size=24, projection_dim=16, **size)
        return Vision(t.CLIPVisionModelWithProjection(config), lambda out: out.image_embeds)
    kinds = {"vit": (t.ViTModel, t.ViTConfig), "dinov2": (t.Dinov2Model, t.Dinov2Config)}
    model, config = kinds[kind]
    module = model(config(**size))
    return Vision(module, lambda out: out.last_hidden_state[:, 0])


KINDS = (Mlp, Depthwise, Words, Odd, Shared, Transposed)
MODELS = {
    **{kind: (lambda kind=kind: vision(kind)) for kind in ("vit", "clip", "dinov2")},
    **{kind.__name__: kind for kind in KINDS},
}
ONE_BY_ONE = {
    "Shared": {"flat.weight", "flat.bias", "alone.weight", "tied.weight"},
    "Words": {"places.weight"},
    "Transposed": {"mix.weight", "mix.bias"},
    "Untraceable": {"gate.gain"},
}


def net_of(name: str) -> Net:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        encoder = {**MODELS, "Untraceable": Untraceable}[name]()
    module = Classes(encoder)
    x = torch.zeros(2, 1, 8, 8, dtype=torch.float64)
    parameters = list(module.parameters())
    grads = torch.autograd.grad(module.eval()(x).sum(), parameters, allow_unused=True)
    for parameter, gradient in zip(parameters, grads, strict=True):
        parameter.requires_grad_(gradient is not None)
    return Net(module, ImageInput(8, 1, (0.4,), (0.3,)))


def generator(seed: int = 7) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def scores(net: Net, ids: Tensor = IDS, labels="empirical", seed: int = 7, **options) -> FisherSum:
    return FisherScorer(net, Pixels(), labels, **options)("train", ids, generator(seed))


def agree(a, b, tolerance: float) -> None:
    """Relative to each tensor's largest score; key biases are noise in both, hence a floor."""
    assert a.keys() == b.keys()
    floor = 1e-12 * max(float(t.abs().max()) for t in b.values())
    for name, tensor in b.items():
        error = (a[name] - tensor).abs().max()
        assert error <= tolerance * tensor.abs().max() + floor, name


def by_hand(net: Net, batch: Batch, task: Task) -> dict[str, Tensor]:
    """One example at a time, ordinary autograd."""
    parameters = trained(net)
    total = {n: torch.zeros_like(p) for n, p in parameters.items()}
    for i in range(len(batch["labels"])):
        loss = task.loss(net, {n: t[i : i + 1] for n, t in batch.items()})[0].sum()
        grads = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        for name, gradient in zip(parameters, grads, strict=True):
            if gradient is not None:
                total[name] += gradient.detach().square()
    return {n: t.detach() for n, t in total.items()}


def by_vmap(net: Net, batch: Batch) -> dict[str, Tensor]:
    parameters = {n: p.detach() for n, p in trained(net).items()}

    def loss(own, x, label):
        return F.cross_entropy(functional_call(net.module, own, (x[None],)), label[None])

    with sdpa_kernel(SDPBackend.MATH):
        gradients = vmap(grad(loss), in_dims=(None, 0, 0))(parameters, batch["x"], batch["labels"])
    return {n: g.square().sum(0) for n, g in gradients.items()}


@pytest.mark.parametrize("name", MODELS)
def test_scores_are_those_of_vmap_in_float64(name):
    net = net_of(name)
    found = scores(net, batch_size=4)
    assert found.count == len(IDS)
    agree(found.sum, by_vmap(net, Pixels().batch("train", IDS)), 1e-10)


@pytest.mark.parametrize("name", [*MODELS, "Untraceable"])
@pytest.mark.parametrize("labels", ["empirical", "sampled"])
def test_scores_are_sums_of_squared_gradients_of_single_examples(name, labels):
    net, task = net_of(name), Pixels()
    batch = task.batch("train", IDS)
    drawn = task.sampled(net, batch, generator()) if labels == "sampled" else batch
    agree(scores(net, labels=labels, batch_size=4).sum, by_hand(net, drawn, task), 1e-10)


@pytest.mark.parametrize("name", [*MODELS, "Untraceable"])
def test_only_what_no_layer_serves_goes_example_by_example(name, caplog):
    net = net_of(name)
    wanted = {n: torch.zeros_like(p).detach() for n, p in trained(net).items()}
    batch = Pixels().batch("train", torch.arange(8))
    layers = find_layers(net, Pixels(), batch, wanted)
    served = {name for own in layers.values() for name in own.values()}
    rest = {f"encoder.{n}" for n in ONE_BY_ONE.get(name, ())}
    assert wanted.keys() - served == rest
    with caplog.at_level(logging.INFO):
        scores(net)
    assert ("example by example" in caplog.text) is bool(rest)


def test_tokens_before_the_batch_are_not_taken_for_it():
    net, ids = net_of("Transposed"), torch.arange(8)
    batch = Pixels().batch("train", ids)
    agree(scores(net, ids, batch_size=8).sum, by_hand(net, batch, Pixels()), 1e-10)


def test_a_squared_batch_gradient_is_something_else():
    """Its expectation keeps 1/B of the noise: a small part of the mass, where Fisher keeps all."""
    net, task, ids = net_of("vit"), Pixels(), torch.arange(32)
    found = scores(net, ids, "sampled").mean()
    batch = task.sampled(net, task.batch("train", ids), generator(1))
    mean = task.loss(net, batch)[0].mean()
    grads = torch.autograd.grad(mean, list(trained(net).values()))
    squared = sum(float(g.square().sum()) for g in grads)
    assert squared < 0.3 * sum(float(t.sum()) for t in found.values())


def test_many_draws_approach_the_sum_over_all_labels():
    """E_y over the three classes, each weighed by its probability, is the exact score."""
    net, task = net_of("Mlp"), Pixels()
    batch = task.batch("train", IDS)
    chances = net(batch["x"]).softmax(1).detach()
    exact = {n: torch.zeros_like(p) for n, p in trained(net).items()}
    for i in range(len(IDS)):
        for k in range(3):
            one = {"x": batch["x"][i : i + 1], "labels": torch.tensor([k])}
            for name, part in by_hand(net, one, task).items():
                exact[name] += chances[i, k] * part
    many = scores(net, labels="sampled", draws=3000, batch_size=700).sum
    for name, tensor in exact.items():
        assert (many[name] - tensor).norm() < 0.05 * tensor.norm(), name
    few = scores(net, labels="sampled").sum
    assert any((few[n] - t).norm() > 0.05 * t.norm() for n, t in exact.items())


@pytest.mark.parametrize("name", ["vit", "Depthwise"])
def test_sums_of_shards_are_the_sum_of_the_union(name):
    net = net_of(name)
    union = scores(net)
    shards = scores(net, IDS[:3]) + scores(net, IDS[3:])
    assert shards.count == union.count
    agree(shards.sum, union.sum, 1e-12)
    agree(shards.mean(), {n: t / len(IDS) for n, t in union.sum.items()}, 1e-12)


def test_targets_depend_on_the_generator_alone():
    net = net_of("Mlp")
    small, large = (scores(net, labels="sampled", draws=2, batch_size=b).sum for b in (2, 64))
    agree(small, large, 1e-12)
    torch.manual_seed(99)
    again = scores(net, labels="sampled", draws=2).sum
    assert all(torch.equal(again[n], t) for n, t in large.items())
    other = scores(net, labels="sampled", draws=2, seed=8).sum
    assert not all(torch.equal(other[n], t) for n, t in large.items())


def test_a_language_model_is_scored_by_the_loss_of_whole_lines(tmp_path):
    net = tiny_llama(tmp_path / "config")
    recipe = DataRecipe.of(data=f"lines:{write_lines(tmp_path / 'text')}")
    task = load_task(recipe, net.inputs, 0)
    ids = torch.tensor([0, 31, 7, 12, 40])
    wanted = {n: torch.zeros_like(p).detach() for n, p in trained(net).items()}
    batch = task.batch("train", ids)
    layers = find_layers(net, task, batch, wanted)
    assert {n for own in layers.values() for n in own.values()} == wanted.keys()
    net.module.eval()
    drawn = task.sampled(net, batch, generator())
    found = FisherScorer(net, task)("train", ids, generator())
    agree(found.sum, by_hand(net, drawn, task), 1e-4)  # float32
    empirical = FisherScorer(net, task, "empirical", batch_size=2)("train", ids)
    agree(empirical.sum, by_hand(net, batch, task), 1e-4)
    assert list(found.sum) == list(net.trained)


def test_the_model_is_left_as_it_was():
    net = net_of("Mlp")
    assert net.flat.grad is not None
    net.flat.grad.fill_(3)
    net.module.train()
    net.module.get_submodule("encoder.norm").eval()
    before = {n: t.clone() for n, t in net.module.state_dict().items()}
    modes = [m.training for m in net.module.modules()]

    def fail(*args):
        raise RuntimeError("broken")

    scores(net)
    handle = net.module.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="broken"):
        scores(net)
    handle.remove()
    assert [m.training for m in net.module.modules()] == modes
    assert all(torch.equal(t, before[n]) for n, t in net.module.state_dict().items())
    assert bool((net.flat.grad == 3).all())
    assert all(p.requires_grad for p in net.module.parameters())
    assert not any(m._forward_hooks for m in net.module.modules())


def test_frozen_parameters_are_left_out():
    net, full = net_of("Mlp"), scores(net_of("Mlp"))
    net.module.get_parameter("encoder.first.weight").requires_grad_(False)
    part = scores(net)
    names = ("first.bias", "norm.weight", "norm.bias", "second.weight")
    assert list(part.sum) == [f"encoder.{n}" for n in names]
    agree(part.sum, {n: full.sum[n] for n in part.sum}, 1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_of_a_classifier_are_float32_in_the_names_of_the_net(dtype):
    """Of a model in 16 bits they are those of the same values in 32."""
    net, task = classifier()
    net.module.to(dtype).float()
    expected = FisherScorer(net, task)("train", IDS, generator())
    net.module.to(dtype)
    found = FisherScorer(net, task)("train", IDS, generator())
    assert list(found.sum) == list(net.slices)
    assert all(t.dtype == torch.float32 for t in found.sum.values())
    agree(found.sum, expected.sum, 1e-6)


def classifier():
    from deltafl.models import HeadRecipe

    net, task = tiny_net(), image_task()
    net.prepare(task, HeadRecipe(head="linear"))
    return net, task


def image_task():

    return tiny_images()


def test_no_examples_sum_to_nothing():
    none = scores(net_of("Mlp"), IDS[:0])
    assert none.count == 0
    assert not any(t.any() for t in none.sum.values())
    with pytest.raises(DeltaflError, match="no examples"):
        none.mean()


def test_mistakes_are_named():
    net = net_of("Mlp")
    with pytest.raises(DeltaflError, match="generator"):
        FisherScorer(net, Pixels())("train", IDS)
    with pytest.raises(DeltaflError, match='did you mean "sampled"'):
        FisherScorer(net, Pixels(), "smpled")  # type: ignore[arg-type]
    with pytest.raises(DeltaflError, match="draws"):
        FisherScorer(net, Pixels(), draws=0)
    net.module.encoder.norm = nn.BatchNorm1d(12, track_running_stats=False)
    with pytest.raises(DeltaflError, match=r'"encoder.norm" has no running statistics'):
        FisherScorer(net, Pixels())
    with pytest.raises(DeltaflError, match="same model"):
        _ = scores(net_of("Mlp")) + scores(net_of("vit"))
