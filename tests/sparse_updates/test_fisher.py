"""Scores against ordinary autograd in float64, example by example, for layers of every kind."""

import logging

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deltafl.errors import DeltaflError
from deltafl.models import Net
from deltafl.sparse.eligible import trained
from deltafl.sparse.fisher import FisherScorer
from deltafl.tasks import ImageInput, load_task
from deltafl.tasks.recipe import DataRecipe
from deltafl.tasks.task import Batch, Task, drawn
from tiny_models import classifier, tiny_llama, write_lines

PIXELS = (
    torch.rand(50, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 2 - 1
)
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
        self.norm.running_mean, self.norm.running_var = torch.rand(2, 4) + 0.5

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self.norm(self.stem(F.pad(x, (0, 1, 0, 1)))), inplace=True)
        return self.same(self.group(self.point(self.depth(x)))).mean((2, 3))


class Words(nn.Module):
    """Pixels as words, repeated within an image, one of them padding; places are the same for all images."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.norm = nn.Embedding(9, 6, padding_idx=2), nn.LayerNorm(6)
        self.places, self.out = nn.Embedding(64, 6), nn.Linear(6, 16)

    def forward(self, x: Tensor) -> Tensor:
        words = (x.detach() * 4 + 4).long().clamp(0, 8)
        places = self.places(torch.arange(64)[None])
        return self.out(self.norm(self.table(words.flatten(1)) + places)).tanh().mean(1)


class Grid(nn.Module):
    """Places of columns, one row for all images, which a row for each image would not broadcast as."""

    def __init__(self) -> None:
        super().__init__()
        self.places, self.out = nn.Embedding(8, 6), nn.Linear(6, 16)

    def forward(self, x: Tensor) -> Tensor:
        rows = x[:, 0, :, :, None] + self.places(torch.arange(8)[None])
        return self.out(rows.tanh()).mean((1, 2))


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
        self.gain = nn.Parameter(torch.ones(1, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * self.gain * (1 if float(x.detach().sum()) > 1e9 else 0.5))


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
    module = t.Dinov2Model(t.Dinov2Config(**size))
    return Vision(module, lambda out: out.last_hidden_state[:, 0])


KINDS = (Mlp, Depthwise, Words, Grid, Shared, Transposed, Untraceable)
MODELS = {
    **{kind: (lambda kind=kind: vision(kind)) for kind in ("clip", "dinov2")},
    **{kind.__name__: kind for kind in KINDS},
}


def net_of(name: str) -> Net:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        module = Classes(MODELS[name]())
    x = torch.zeros(2, 1, 8, 8, dtype=torch.float64)
    parameters = list(module.parameters())
    grads = torch.autograd.grad(module.eval()(x).sum(), parameters, allow_unused=True)
    for parameter, gradient in zip(parameters, grads, strict=True):
        parameter.requires_grad_(gradient is not None)
    return Net(module, ImageInput(8, 1, (0.4,), (0.3,)))


def generator(seed: int = 7) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def scores(
    net: Net, ids: Tensor = IDS, labels="empirical", seed: int = 7, **options
) -> dict[str, Tensor]:
    return FisherScorer(net, Pixels(), labels, **options)(ids, generator(seed))


def agree(a, b, tolerance: float) -> None:
    """Relative to each tensor's largest score; key biases are noise in both, hence a floor."""
    assert list(a) == list(b)
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


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("labels", ["empirical", "sampled"])
def test_scores_are_sums_of_squared_gradients_of_single_examples(name, labels, caplog):
    """At once, or one after the other, which is logged. Eight images look like eight tokens."""
    net, task, ids = net_of(name), Pixels(), torch.cat([IDS, torch.tensor([11])])
    batch = task.batch("train", ids)
    batch = task.sampled(net, batch, generator()) if labels == "sampled" else batch
    expected = by_hand(net, batch, task)
    for size in (8, 3):
        scorer = FisherScorer(net, task, labels, batch_size=size)
        with caplog.at_level(logging.INFO):
            agree(scorer(ids, generator()), expected, 1e-10)
        assert ("example by example" in caplog.text) is (name == "Untraceable")


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
    many = scores(net, labels="sampled", draws=3000, batch_size=700)
    few = scores(net, labels="sampled")
    assert all((many[n] - t).norm() < 0.05 * t.norm() for n, t in exact.items())
    assert any((few[n] - t).norm() > 0.05 * t.norm() for n, t in exact.items())


@pytest.mark.parametrize("name", ["dinov2", "Depthwise"])
def test_sums_of_shards_are_the_sum_of_the_union(name):
    net = net_of(name)
    one, two = scores(net, IDS[:3]), scores(net, IDS[3:])
    agree({n: t + two[n] for n, t in one.items()}, scores(net), 1e-12)


def test_targets_depend_on_the_generator_alone():
    net = net_of("Mlp")
    small, large = (scores(net, labels="sampled", draws=2, batch_size=b) for b in (2, 64))
    agree(small, large, 1e-12)
    torch.manual_seed(99)
    again, other = (scores(net, labels="sampled", draws=2, seed=s) for s in (7, 8))
    assert all(torch.equal(again[n], t) for n, t in large.items())
    assert not all(torch.equal(other[n], t) for n, t in large.items())


@pytest.mark.parametrize("tied", [False, True])
def test_a_language_model_is_scored_by_the_loss_of_whole_lines(tied, tmp_path):
    net = tiny_llama(tmp_path / "config")
    if tied:
        net.module.lm_head.weight = net.module.model.embed_tokens.weight
    task = load_task(DataRecipe.of(data=f"lines:{write_lines(tmp_path / 'text')}"), net.inputs, 0)
    ids = torch.tensor([0, 31, 7, 12, 40])
    batch = task.batch("train", ids)
    net.module.eval()
    drawn = task.sampled(net, batch, generator())
    scorer = FisherScorer(net, task)
    agree(scorer(ids, generator()), by_hand(net, drawn, task), 1e-4)  # float32
    empirical = FisherScorer(net, task, "empirical", batch_size=2)(ids, generator())
    agree(empirical, by_hand(net, batch, task), 1e-4)


def test_the_model_is_left_as_it_was():
    net = net_of("Mlp")
    assert net.flat.grad is not None
    net.flat.grad.fill_(3)
    net.module.train()
    before = {n: t.clone() for n, t in net.module.state_dict().items()}
    scores(net)
    handle = net.module.register_forward_hook(lambda *_: pytest.fail("broken"))
    with pytest.raises(pytest.fail.Exception, match="broken"):
        scores(net)
    handle.remove()
    assert all(m.training and not m._forward_hooks for m in net.module.modules())
    assert all(torch.equal(t, before[n]) for n, t in net.module.state_dict().items())
    assert bool((net.flat.grad == 3).all())
    assert all(p.requires_grad for p in net.module.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_of_a_classifier_are_float32_in_the_names_of_the_net(dtype):
    """Of a model in 16 bits they are those of the same values in 32."""
    net, task = classifier()
    net.module.to(dtype).float()
    expected = FisherScorer(net, task)(IDS, generator())
    net.module.to(dtype)
    found = FisherScorer(net, task)(IDS, generator())
    assert list(found) == list(net.slices)
    assert all(t.dtype == torch.float32 for t in found.values())
    agree(found, expected, 1e-6)


def test_batch_norm_that_mixes_examples_is_refused():
    net = net_of("Mlp")
    net.module.encoder.norm = nn.BatchNorm1d(12, track_running_stats=False)
    with pytest.raises(DeltaflError, match=r'"encoder.norm" has no running statistics'):
        scores(net)
