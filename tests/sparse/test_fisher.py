from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deltafl.errors import DeltaflError
from deltafl.models.encoder import InputSpec, LoadedEncoder, assemble
from deltafl.models.flat import FlatModel
from deltafl.sparse.capture import make_plan
from deltafl.sparse.fisher import (
    FisherSum,
    _Classifier,
    diagonal_fisher,
    encoder_fisher,
    reference_fisher,
)
from tiny_models import tiny_head, tiny_task, tiny_vit

SPLIT = tiny_task().train
IDS = torch.tensor([3, 0, 17, 8, 41, 20, 5])


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = (
            nn.Linear(64, 12),
            nn.BatchNorm1d(12),
            nn.Linear(12, 16, bias=False),
        )
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.relu(self.norm(self.first(x.flatten(1)))))


class Depthwise(nn.Module):
    """As MobileNet: padded by hand, in-place activations, and a strided, a dilated and a string-padded convolution."""

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
    """Pixels as words, repeated within an image, one of them padding."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.norm, self.out = (
            nn.Embedding(9, 6, padding_idx=2),
            nn.LayerNorm(6),
            nn.Linear(6, 16),
        )

    def forward(self, x: Tensor) -> Tensor:
        words = (x.detach() * 4 + 4).long().clamp(0, 8)
        return self.out(self.norm(self.table(words[:, 0]))).tanh().mean((1, 2))


class Shared(nn.Module):
    """A layer called twice, one with its tokens in the batch dimension, a weight used twice, and a raw parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.flat, self.out = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 16)
        self.scale, self.alone = nn.Parameter(torch.rand(8)), nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.norm(self.norm(self.twice(self.twice(x[:, 0]).tanh()).tanh()))
        rows = self.flat(rows.flatten(0, 1)).view_as(rows) * self.scale
        return self.out((self.alone(rows).tanh() @ self.alone.weight).mean(1))


class Transposed(nn.Module):
    """Eight tokens first, then the batch: with eight images the dimensions look alike."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.out = nn.Linear(8, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.mix(x[:, 0].transpose(0, 1)).tanh().mean(0))


def encoder_of(kind: type[nn.Module]) -> LoadedEncoder:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return assemble(kind(), lambda m, x: m(x), InputSpec(8, 1, (0.4,), (0.3,)), "test")


def clip() -> LoadedEncoder:
    import transformers

    config = transformers.CLIPVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4,
        num_channels=1, projection_dim=16,
    )  # fmt: skip
    module = transformers.CLIPVisionModelWithProjection(config)
    return assemble(
        module, lambda m, x: m(pixel_values=x).image_embeds, InputSpec(8, 1, (0.4,), (0.3,)), "clip"
    )


def dinov2() -> LoadedEncoder:
    import transformers

    config = transformers.Dinov2Config(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
        num_channels=1,
    )
    module = transformers.Dinov2Model(config)
    return assemble(
        module,
        lambda m, x: m(pixel_values=x).last_hidden_state[:, 0],
        InputSpec(8, 1, (0.4,), (0.3,)),
        "dinov2",
    )


MODELS = {
    "vit": tiny_vit,
    "clip": clip,
    "dinov2": dinov2,
    **{
        kind.__name__: (lambda kind=kind: encoder_of(kind))
        for kind in (Mlp, Depthwise, Words, Shared, Transposed)
    },
}
BY_VMAP = {
    "Shared": {"flat.weight", "flat.bias", "scale", "alone.weight"},
    "Transposed": {"mix.weight", "mix.bias"},
}


def generator(seed: int = 7) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def double(name: str) -> LoadedEncoder:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        encoder = MODELS[name]()
    encoder.module.double()
    return encoder


def fisher(
    encoder, ids=IDS, labels="exact", draws=1, seed=7, batch_size=4, fast=True, head=None
) -> FisherSum:
    head = tiny_head() if head is None else head
    return encoder_fisher(
        encoder, head, SPLIT, ids, labels, draws, generator(seed), batch_size, fast
    )


def agree(a, b, tolerance: float) -> None:
    """Relative to each tensor's largest score; key biases are noise in both, hence the floor of the whole model."""
    assert a.keys() == b.keys()
    floor = 1e-12 * max(float(t.abs().max()) for t in b.values())
    for name, tensor in b.items():
        error = (a[name] - tensor).abs().max()
        assert error <= tolerance * tensor.abs().max() + floor, name


def by_hand(encoder: LoadedEncoder, ids: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
    """One example at a time, ordinary autograd, data labels."""
    head = tiny_head()
    parameters = {n: p for n, p in encoder.module.named_parameters() if p.requires_grad}
    total = {n: torch.zeros_like(p) for n, p in parameters.items()}
    dtype = next(iter(parameters.values())).dtype
    for i in ids.tolist():
        inputs = encoder.input.normalise(SPLIT.images[i : i + 1]).to(dtype)
        logits = F.linear(
            encoder.embed(encoder.module, inputs), head.weight.to(dtype), head.bias.to(dtype)
        )
        loss = F.cross_entropy(logits, SPLIT.labels[i : i + 1])
        for name, grad in zip(
            parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True
        ):
            total[name] += grad.detach().square()
    return {n: t.detach() for n, t in total.items()}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("labels", ["sampled", "empirical", "exact"])
def test_fast_and_reference_agree_in_float64(name, labels):
    encoder = double(name)
    fast = fisher(encoder, labels=labels, draws=2 if labels == "sampled" else 1)
    slow = fisher(
        encoder, labels=labels, draws=2 if labels == "sampled" else 1, batch_size=5, fast=False
    )
    assert fast.count == slow.count == len(IDS)
    agree(fast.sum, slow.sum, 1e-10)


@pytest.mark.parametrize("name", MODELS)
def test_empirical_is_the_sum_of_squared_gradients_of_single_examples(name):
    encoder = double(name)
    agree(fisher(encoder, labels="empirical").sum, by_hand(encoder, IDS), 1e-10)


@pytest.mark.parametrize("name", MODELS)
def test_only_layers_without_a_rule_take_the_slow_path(name):
    encoder = double(name)
    net = _Classifier(encoder, tiny_head())
    wanted = {f"encoder.{n}" for n, p in encoder.module.named_parameters() if p.requires_grad}
    inputs, _ = net.batch(SPLIT, torch.arange(8))
    assert wanted - make_plan(net, inputs, wanted).covered == {
        f"encoder.{n}" for n in BY_VMAP.get(name, ())
    }


def test_tokens_before_the_batch_are_not_taken_for_it():
    encoder = double("Transposed")
    ids = torch.arange(8)
    agree(fisher(encoder, ids, "empirical", batch_size=8).sum, by_hand(encoder, ids), 1e-10)


def test_a_squared_batch_gradient_is_something_else():
    """Its expectation keeps 1/B of the noise: here a small part of the mass, where Fisher keeps all of it."""
    encoder = double("vit")
    ids = torch.arange(32)
    scores = fisher(encoder, ids, "sampled", batch_size=32).mean()
    net = _Classifier(encoder, tiny_head())
    inputs, _ = net.batch(SPLIT, ids)
    log_p = net(inputs).log_softmax(1)
    drawn = torch.multinomial(log_p.exp(), 1, generator=generator(1))
    parameters = [p for p in encoder.module.parameters() if p.requires_grad]
    squared = sum(
        float(g.square().sum())
        for g in torch.autograd.grad(log_p.gather(1, drawn).mean(), parameters)
    )
    assert squared < 0.3 * sum(float(t.sum()) for t in scores.values())


def test_many_sampled_labels_approach_the_exact_score():
    encoder = double("Mlp")
    exact = fisher(encoder).sum
    sampled = fisher(encoder, labels="sampled", draws=3000).sum
    for name, tensor in exact.items():
        assert (sampled[name] - tensor).norm() < 0.05 * tensor.norm(), name
    few = fisher(encoder, labels="sampled", draws=1).sum
    assert any((few[n] - t).norm() > 0.05 * t.norm() for n, t in exact.items())


def test_a_linear_model_has_the_formula_of_multinomial_regression():
    """z = V W x: E_y[(dz)^2]_jk = x_k^2 sum_y p_y (V^T (e_y - p))_j^2."""
    encoder = encoder_of(Line)
    encoder.module.double()
    head = tiny_head()
    V, b = head.weight.double(), head.bias.double()
    x = encoder.input.normalise(SPLIT.images[IDS]).double().flatten(1)
    p = (x @ encoder.module.line.weight.detach().mT @ V.mT + b).softmax(1)
    pull = (torch.eye(3, dtype=torch.float64)[None] - p[:, None]) @ V
    expected = torch.einsum("iy,iyj,ik->jk", p, pull.square(), x.square())
    torch.testing.assert_close(fisher(encoder).sum["line.weight"], expected, rtol=1e-12, atol=0)


class Line(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(64, 16, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.line(x.flatten(1))


@pytest.mark.parametrize("name", ["vit", "Depthwise"])
def test_sums_of_shards_are_the_sum_of_the_union(name):
    encoder = double(name)
    union = fisher(encoder, labels="empirical")
    shards = fisher(encoder, IDS[:3], "empirical") + fisher(encoder, IDS[3:], "empirical")
    assert shards.count == union.count
    agree(shards.sum, union.sum, 1e-12)
    agree(shards.mean(), {n: t / len(IDS) for n, t in union.sum.items()}, 1e-12)


def test_labels_depend_on_the_generator_alone():
    encoder = double("Mlp")
    small, large = (fisher(encoder, labels="sampled", batch_size=b).sum for b in (2, 64))
    agree(small, large, 1e-12)
    torch.manual_seed(99)
    again = fisher(encoder, labels="sampled", batch_size=64).sum
    assert all(torch.equal(again[n], t) for n, t in large.items())
    other = fisher(encoder, labels="sampled", seed=8, batch_size=64).sum
    assert not all(torch.equal(other[n], t) for n, t in large.items())


class Dropped(Mlp):
    """In training mode, with one frozen layer that was put in eval mode by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.dropout(x))


def test_the_model_is_left_as_it_was():
    model = FlatModel(encoder_of(Dropped))
    model.module.train()
    model.module.get_submodule("norm").eval()
    assert model.flat.grad is not None
    model.flat.grad.fill_(3)
    before = {n: t.clone() for n, t in model.module.state_dict().items()}
    modes = [m.training for m in model.module.modules()]
    first = diagonal_fisher(model, tiny_head(), SPLIT, IDS, labels="empirical")
    model.module.eval()
    agree(first.sum, diagonal_fisher(model, tiny_head(), SPLIT, IDS, labels="empirical").sum, 0)
    model.module.train()
    model.module.get_submodule("norm").eval()
    broken = replace(SPLIT, labels=SPLIT.labels[:1])
    with pytest.raises(IndexError):
        diagonal_fisher(model, tiny_head(), broken, IDS, labels="exact")
    diagonal_fisher(model, tiny_head(), SPLIT, IDS, labels="exact")
    assert [m.training for m in model.module.modules()] == modes
    assert all(torch.equal(t, before[n]) for n, t in model.module.state_dict().items())
    assert bool((model.flat.grad == 3).all())
    assert all(p.requires_grad for p in model.module.parameters())
    assert all(p.grad is not None and bool((p.grad == 3).all()) for p in model.module.parameters())
    assert not any(m._forward_hooks for m in model.module.modules())


def test_hooks_and_modes_are_restored_after_an_error():
    class Failing(Mlp):
        fail = False

        def forward(self, x: Tensor) -> Tensor:
            x = super().forward(x)
            if self.fail:
                raise RuntimeError("broken")
            return x

    encoder = encoder_of(Failing)
    encoder.module.train()
    encoder.module.fail = True
    parameters = list(encoder.module.parameters())
    with pytest.raises(RuntimeError, match="broken"):
        fisher(encoder)
    assert all(m.training for m in encoder.module.modules())
    assert not any(m._forward_hooks for m in encoder.module.modules())
    assert all(p is q for p, q in zip(encoder.module.parameters(), parameters, strict=True))


def test_frozen_and_integer_parameters_are_left_out():
    encoder = encoder_of(Mlp)
    encoder.module.first.weight.requires_grad_(False)
    encoder.module.steps = nn.Parameter(torch.zeros(2, dtype=torch.int64), requires_grad=False)
    full = fisher(encoder_of(Mlp))
    part = fisher(encoder)
    assert list(part.sum) == ["first.bias", "norm.weight", "norm.bias", "second.weight"]
    agree(part.sum, {n: full.sum[n] for n in part.sum}, 1e-6)


def test_of_a_flat_model_it_is_float32_in_its_names_and_near_float64():
    model = FlatModel(tiny_vit())
    fast = diagonal_fisher(model, tiny_head(), SPLIT, IDS, generator=generator())
    slow = reference_fisher(model, tiny_head(), SPLIT, IDS, generator=generator())
    assert list(fast.sum) == list(slow.sum) == list(model.tensors())
    assert all(
        t.dtype == torch.float32 and t.shape == model.tensors()[n].shape
        for n, t in fast.sum.items()
    )
    exact = fisher(double("vit"), labels="sampled").sum
    for result in (fast, slow):
        for name, tensor in exact.items():
            if not name.endswith("k_proj.bias"):
                assert (result.sum[name] - tensor).abs().max() <= 1e-4 * tensor.abs().max(), name


def test_no_examples_sum_to_nothing():
    none = fisher(double("Mlp"), IDS[:0])
    assert none.count == 0
    assert not any(t.any() for t in none.sum.values())
    with pytest.raises(DeltaflError, match="no examples"):
        none.mean()


def test_mistakes_are_named():
    model = FlatModel(tiny_vit())
    head = tiny_head()
    with pytest.raises(DeltaflError, match="generator"):
        diagonal_fisher(model, head, SPLIT, IDS)
    with pytest.raises(DeltaflError, match='did you mean "exact"'):
        diagonal_fisher(model, head, SPLIT, IDS, labels="exakt")  # type: ignore[arg-type]
    with pytest.raises(DeltaflError, match="draws"):
        diagonal_fisher(model, head, SPLIT, IDS, draws=0, generator=generator())
    with pytest.raises(DeltaflError, match="takes 5 features"):
        diagonal_fisher(model, tiny_head(5), SPLIT, IDS, labels="exact")
    with pytest.raises(DeltaflError, match="3 classes"):
        diagonal_fisher(
            model,
            head,
            replace(SPLIT, labels=SPLIT.labels + 1),
            torch.arange(3),
            labels="empirical",
        )
    mixing = encoder_of(Mlp)
    mixing.module.norm = nn.BatchNorm1d(12, track_running_stats=False)
    with pytest.raises(DeltaflError, match='"norm" has no running statistics'):
        fisher(mixing)
    with pytest.raises(DeltaflError, match="same model"):
        _ = fisher(double("Mlp")) + fisher(double("vit"))
