"""What the laws are tried on: a few deltas, what is known of their training, and weights."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from deltafl.algebra.aggregate import Aggregate, WeightsLike, check_rule
from deltafl.algebra.deltas import Update
from deltafl.algebra.tensors import BLOCK, Lazy, Spec
from deltafl.errors import DeltaflError
from deltafl.rules.building import build_rule, load_rules
from deltafl.rules.rule import RULES, ExampleRule, Rule, Source, TensorRule

SHAPES = {"layer.weight": (5, 7), "layer.bias": (33,), "scale": (), "nothing": (0, 3)}
LARGE = {"head": (3,), "embedding": (BLOCK // 4 + 1, 4), "scale": ()}

Delta = dict[str, Tensor]


EXAMPLES: dict[str, list[dict[str, Any]]] = {
    "cclip": [{"rho": 1.0}, {"rho": 0.5, "unit": "quantile"},
              {"rho": 0.5, "unit": "quantile", "iterations": 3}],
    "breadcrumbs": [{"density": 0.6, "gamma": 0.1}, {"density": 0.95, "gamma": 0.2, "inner": "elect"}],
    "consensus": [{}, {"mask_threshold": 0.2, "min_models": 3}],
    "dare": [{"drop_rate": 0.5, "seed": 0},
             {"drop_rate": 0.9, "inner": "ties", "density": 0.5, "seed": 0},
             {"drop_rate": 0.3, "inner": "krum", "rescale": "l1"}],
    "della": [{"density": 0.5}, {"density": 0.3, "inner": "median", "rescale": "probability"},
              {"density": 0.7, "inner": "iso_c"}],
    "fedgma": [{"rho": 0.0}, {"rho": 0.6}, {"rho": 1.0}],
    "fednova": [{}, {"normalizer": "momentum"}, {"normalizer": "prox"}],
    "iso_c": [{}, {"power": 0.5}],
    "iso_cts": [{}, {"common_fraction": 0.2}],
    "knots": [{}, {"inner": "ties", "density": 1.0}, {"inner": "median"}],
    "median": [{}, {"middle": "lower"}],
    "model_stock": [{}, {"filter_wise": True}],
    "multi_krum": [{}, {"num_selected": 2}],
    "multislerp": [{}, {"space": "weights"}],
    "nuslerp": [{}, {"space": "weights"}, {"per": "row"}, {"space": "weights", "per": "column"}],
    "sce": [{}, {"select_topk": 0.5}],
    "slerp": [{"t": 0.3}, {"t": {"layer.*": [0.0], "*": [1.5]}}],
    "ties": [{}, {"density": 0.5, "merge": "sum"}, {"density": 0.5, "per_tensor": True},
             {"density": 1.0}, {"density": 0.5, "zero_sum": "positive"}],
    "trimmed_mean": [{"trim": 0}, {"trim": 1}],
    "wudi": [{}, {"prior": "sum", "ridge": 0.1}],
}  # fmt: skip
"""Parameters that rules are tried with; the other rules, and new ones, with their typical ones."""


def examples(name: str) -> list[Rule]:
    """Instances of one rule."""
    rule = load_rules()[name]
    return [build_rule(name, params) for params in EXAMPLES.get(name, [rule.typical()])]


def rules() -> list[Rule]:
    """Examples of every rule of deltas alone, those of one that is registered later included."""
    found = [example for name in load_rules() for example in examples(name)]
    return [example for example in found if not isinstance(example, ExampleRule)]


@contextmanager
def registered(name: str, rule: Any) -> Iterator[None]:
    """The registry with one more rule."""
    RULES.register(name)(rule)
    try:
        yield
    finally:
        del RULES[name]


def source(i: int) -> Source:
    """Everything that any rule asks for, different for each model."""
    return Source(f"model{i}", 100 + 50 * i, 10 + 7 * i, 0.01 * (i + 1), 0.1 * (i % 5), 0.5 + i)


@dataclass(frozen=True)
class World:
    """n deltas with sources and weights, and the base they are from."""

    deltas: tuple[Delta, ...]
    sources: tuple[Source, ...]
    base: Delta
    weights: tuple[float, ...] | None = None

    @property
    def updates(self) -> list[Update]:
        return [Update(d, s) for d, s in zip(self.deltas, self.sources, strict=True)]

    def mapped(self, change: Callable[[Tensor], Tensor]) -> "World":
        """The same world with every tensor changed."""
        return replace(
            self, deltas=tuple({k: change(v) for k, v in d.items()} for d in self.deltas)
        )

    def reordered(self, order: Sequence[int]) -> "World":
        """The same models in another order."""
        weights = None if self.weights is None else tuple(self.weights[i] for i in order)
        return replace(
            self,
            deltas=tuple(self.deltas[i] for i in order),
            sources=tuple(self.sources[i] for i in order),
            weights=weights,
        )

    def fitting(self, rule: Rule) -> "World":
        """As many models as the rule merges, of weights that are not negative if it asks for that."""
        world = self.reordered(range(len(self.deltas))[: rule.core.num_models])
        return (
            replace(world, weights=tuple(map(abs, world.weights or ())) or None)
            if of_weights(rule)
            else world
        )

    def with_flat(self, change: Callable[[Tensor], Tensor]) -> "World":
        """The same world with the base and each delta changed as one flat vector."""
        base, *deltas = (unflatten(change(flatten(d)), d) for d in (self.base, *self.deltas))
        return replace(self, base=base, deltas=tuple(deltas))


def flatten(delta: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([t.reshape(-1) for t in delta.values()])


def unflatten(flat: Tensor, like: Mapping[str, Tensor]) -> Delta:
    parts = flat.split([t.numel() for t in like.values()])
    return {
        name: part.reshape(t.shape) for (name, t), part in zip(like.items(), parts, strict=True)
    }


def result(rule: Rule, world: World, weights: WeightsLike = None, **options: Any) -> Delta:
    """R(delta_1 .. delta_n), all of it; `weights` go before the world's own."""
    return dict(
        Aggregate(
            rule,
            world.updates,
            world.weights if weights is None else weights,
            base=world.base,
            **options,
        )
    )


def of_weights(rule: Rule) -> bool:
    """Whether it is a rule of whole weights."""
    return isinstance(rule.core, TensorRule) and rule.core.space == "weights"


def refusal(rule: Rule, sources: Sequence[Source]) -> str | None:
    """Why the rule cannot work with these sources, or None."""
    try:
        check_rule(rule, sources)
    except DeltaflError as error:
        return str(error)
    return None


def make(
    n: int, seed: int, kind: str = "normal", scale: float = 1.0, shapes: Mapping[str, Any] = SHAPES
) -> World:
    """n deltas of one kind.

    normal: no two values alike. grid: few integer values, so that equal values, zeros and sums of exactly zero are
    frequent (exact ones, if scale is a power of 2). bfloat16: as fine-tunes in 16 bits give them.
    """
    draw = torch.Generator().manual_seed(seed)

    def tensor(shape: tuple[int, ...]) -> Tensor:
        if kind == "grid":
            return torch.randint(-3, 4, shape, generator=draw).float() * scale
        values = torch.randn(shape, generator=draw) * scale
        return values.bfloat16().float() if kind == "bfloat16" else values

    *deltas, base = (
        {name: tensor(tuple(shape)) for name, shape in shapes.items()} for _ in range(n + 1)
    )
    return World(tuple(deltas), tuple(source(i) for i in range(n)), base)


@st.composite
def worlds(
    draw: st.DrawFn, kinds: Sequence[str] = ("normal", "grid", "bfloat16"), weighted: bool = True
) -> World:
    """3 to 7 models; weights, where there are any, positive with small integer ratios."""
    n = draw(st.integers(3, 7))
    world = make(
        n,
        draw(st.integers(0, 2**20)),
        draw(st.sampled_from(kinds)),
        draw(st.sampled_from([2**-12, 1.0, 2**6])),
    )
    if weighted and draw(st.booleans()):
        ratios = draw(st.lists(st.integers(1, 3), min_size=n, max_size=n))
        world = replace(world, weights=tuple(map(float, ratios)))
    return world


class ByBlocks(Lazy):
    """Tensors that are read by blocks only, as a checkpoint on disk is; blocks are views. Counts reads."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors, self.names, self.reads = tensors, tensors, 0

    def __getitem__(self, name: str) -> Tensor:
        raise AssertionError(f"{name} was read whole")

    def spec(self, name: str) -> Spec:
        return Spec(tuple(self.tensors[name].shape), self.tensors[name].dtype)

    def read(self, name: str, start: int, stop: int, out: Tensor) -> None:
        out.copy_(self.block(name, start, stop))

    def block(self, name: str, start: int, stop: int, dtype: torch.dtype | None = None) -> Tensor:
        self.reads += 1
        block = self.tensors[name].reshape(-1)[start:stop]
        return block if dtype is None else block.to(dtype)


def assert_same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> None:
    """Equal names, shapes, dtypes and values, bit for bit up to the sign of zero."""
    assert list(a) == list(b)
    for name in a:
        assert (a[name].shape, a[name].dtype) == (b[name].shape, b[name].dtype), name
        assert torch.equal(a[name], b[name]), name


def assert_close(a: Mapping[str, Tensor], b: Mapping[str, Tensor], world: World) -> None:
    """Equal up to rounding in float32 of the deltas that went in."""
    assert list(a) == list(b)
    largest = max(float(flatten(d).abs().max()) for d in world.deltas)
    for name in a:
        torch.testing.assert_close(
            a[name], b[name], rtol=1e-5, atol=2e-6 * largest, check_dtype=False
        )
