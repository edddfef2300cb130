"""Task vectors against float64 numpy, and what their operations refuse."""

import copy
import math
from collections.abc import Callable, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from checkpoint_files import fails, save, toy, tuned
from deltafl import (
    Source,
    TaskVector,
    Update,
    cclip,
    fedavg,
    fedgma,
    fednova,
    median,
    task_arithmetic,
)
from deltafl.algebra.aggregate import aggregate
from deltafl.checkpoints.checkpoint import Checkpoint
from deltafl.errors import DeltaflError
from deltafl.models.fit import random_head
from deltafl.models.head import HEAD_FILE, save_head
from deltafl.rules.building import build_rule

FLOATS = [n for n, t in toy().items() if t.is_floating_point()]
FLOAT32 = {"rtol": 2e-6, "atol": 2e-6}  # some float32 roundings of a sum of five terms up to 20
Array = np.ndarray


def arrays(tensors: Mapping[str, Tensor]) -> dict[str, Array]:
    return {n: t.double().numpy() for n, t in tensors.items() if t.is_floating_point()}


def assert_close(found: TaskVector | Mapping[str, Tensor], wanted: Mapping[str, Array]) -> None:
    held = arrays(found.tensors if isinstance(found, TaskVector) else found)
    assert set(held) == set(wanted)
    for name, values in held.items():
        np.testing.assert_allclose(values, wanted[name], err_msg=name, **FLOAT32)


def vector(seed: int = 0, scale: float = 1.0) -> TaskVector:
    return TaskVector({n: t for n, t in toy(seed, scale).items() if t.is_floating_point()})


def combine(wanted: Callable[..., Any], *held: TaskVector | Mapping[str, Tensor]) -> dict[str, Any]:
    parts = [arrays(h.tensors if isinstance(h, TaskVector) else h) for h in held]
    return {n: wanted(*(part[n] for part in parts)) for n in parts[0]}


class Net(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.first, self.norm = nn.Linear(3, 5), nn.BatchNorm1d(5)


# From checkpoints


def test_it_is_the_difference_of_the_float_tensors_in_memory_or_files(tmp_path: Path) -> None:
    """A float64 model loses nothing, bfloat16 is widened, and files are read only when asked."""
    for wide in (0, 1):
        held = [toy(), tuned(toy(), 1)]
        held[wide] = {n: t.double() + 1e-12 if n in FLOATS else t for n, t in held[wide].items()}
        delta = TaskVector.from_checkpoints(*held)
        for name, values in combine(lambda a, b: b - a, *held).items():
            assert np.array_equal(delta.tensors[name].numpy(), values)
    base = toy(dtype=torch.bfloat16)
    narrow = TaskVector.from_checkpoints(base, tuned(base, 1))
    assert {t.dtype for t in narrow.tensors.values()} == {torch.float32}
    assert_close(narrow, combine(lambda a, b: b - a, base, tuned(base, 1)))
    elements = sum(toy()[name].numel() for name in FLOATS)
    assert repr(narrow) == f"TaskVector(5 tensors, {elements:,} elements)"
    both = {"base": toy(), "finetuned": tuned(toy(), 1)}
    for files in (["base"], ["finetuned"], ["base", "finetuned"]):
        stored = {n: save(tmp_path / "-".join(files) / n, both[n]) for n in files}
        found = TaskVector.from_checkpoints(**(both | stored))
        assert_close(found, combine(lambda a, b: b - a, *both.values()))


def test_files_are_read_only_when_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads, read = list[str](), Checkpoint.read
    monkeypatch.setattr(
        Checkpoint, "read", lambda self, name, *rest: (reads.append(name), read(self, name, *rest))
    )
    base, model = save(tmp_path / "base", toy()), save(tmp_path / "model", tuned(toy(), 1))
    delta = TaskVector.from_checkpoints(base, model)
    assert not reads
    delta.tensors["layer.0.bias"]
    assert reads == ["layer.0.bias"] * 2


def test_what_does_not_fit_is_named_and_a_head_of_the_model_alone_is_left_out(tmp_path):
    model = tuned(toy(), 1) | {"embed.weight": torch.ones(11, 8)}
    del model["norm.weight"]
    with pytest.raises(DeltaflError) as error:
        TaskVector.from_checkpoints(toy(), model)
    shape, missing = error.value.problems
    assert '"embed.weight": 11 rows, the base has 9' in shape
    assert '"norm.weight"' in missing
    folder = save(tmp_path / "model", tuned(toy(), 1))
    save_head(random_head(16, ("a", "b"), torch.Generator()), folder / HEAD_FILE)
    assert sorted(TaskVector.from_checkpoints(toy(), folder).tensors) == sorted(FLOATS)


# Algebra


@settings(max_examples=20, deadline=None)
@given(st.lists(st.floats(-1, 1), min_size=1, max_size=4))
def test_it_is_a_vector_space_whose_operations_change_no_operand(factors: list[float]) -> None:
    vectors = [vector(i) for i in range(len(factors))]
    before = copy.deepcopy([v.tensors for v in vectors])
    total: Any = sum(f * v for f, v in zip(factors, vectors, strict=True))
    wanted = combine(lambda *x: sum(f * v for f, v in zip(factors, x, strict=True)), *vectors)
    assert_close(total, wanted)
    assert_close(vectors[0] - total * 2, combine(lambda a, b: a - 2 * b, vectors[0], total))
    assert_close(-total, {n: -values for n, values in wanted.items()})
    applied = vectors[0].apply_to(base := toy(9))
    made = [total.tensors, task_arithmetic(vectors).tensors, median(vectors).tensors, applied]
    for tensor in chain.from_iterable(tensors.values() for tensors in made):
        tensor.fill_(7)
    for held, was in zip([v.tensors for v in vectors] + [base], [*before, toy(9)], strict=True):
        assert all(torch.equal(held[n], was[n]) for n in was)


BINARY: list[Callable[[TaskVector, Any], object]] = [
    lambda a, b: a + b,
    lambda a, b: a - b,
    lambda a, b: a.dot(b),
    lambda a, b: median([a, b]),
]


@pytest.mark.parametrize("of", BINARY)
def test_task_vectors_of_other_tensors_or_shapes_are_an_error_that_names_them(of) -> None:
    held = dict(vector(1).tensors)
    wide = TaskVector({**held, "layer.0.bias": torch.ones(1)})  # (1,) would broadcast
    fails(r'"layer.0.bias" is \(\d,\)', of, vector(), wide)
    del held["layer.0.bias"]
    odd = TaskVector(held | {"extra": torch.ones(2)})
    for pair in ((vector(), odd), (odd, vector())):
        fails(r'differ in tensors: "extra", "layer\.0\.bias"', of, *pair)
    for other in (1, "x", toy()) if of in BINARY[:2] else ():
        with pytest.raises(TypeError):
            of(vector(), other)


def test_norms_and_products_are_those_of_float64() -> None:
    a, b = vector(0), vector(1)
    product = sum(combine(lambda x, y: float((x * y).sum()), a, b).values())
    square = sum(combine(lambda x: float((x**2).sum()), a).values())
    assert (a.dot(b), a.norm()) == pytest.approx((product, math.sqrt(square)), rel=1e-12)
    half = TaskVector({"w": torch.full((4,), 6e4, dtype=torch.float16)})
    assert half.norm() == pytest.approx(2 * 60000, rel=1e-15)


# Application


def test_applying_adds_the_scaled_delta_and_leaves_the_rest_of_the_base(tmp_path: Path) -> None:
    base, model = toy(), tuned(toy(), 1)
    delta = TaskVector.from_checkpoints(base, model)
    applied = delta.apply_to(base, scaling_coef=0.3)
    assert list(applied) == list(base)
    assert_close(applied, combine(lambda a, b: a + 0.3 * (b - a), base, model))
    assert torch.equal(applied["steps"], base["steps"])
    assert_close(delta.apply_to(base), arrays(model))
    from_file = delta.apply_to(save(tmp_path / "base", toy()), 0.3)
    assert all(torch.equal(from_file[n], applied[n]) for n in applied)
    part = TaskVector({"layer.0.bias": torch.ones(8)}).apply_to(base)
    for name in base:
        assert torch.equal(part[name], base[name] + 1 if name == "layer.0.bias" else base[name])
    with pytest.raises(DeltaflError, match='the base lacks tensors of the update: "other"'):
        TaskVector({"other": torch.ones(2)}).apply_to(toy())
    with pytest.raises(DeltaflError, match=r'"layer.0.bias".*\(1,\).*\(8,\)'):
        TaskVector({"layer.0.bias": torch.ones(1)}).apply_to(toy())


def test_modules_are_read_as_they_are_and_a_new_one_of_the_same_class_is_made() -> None:
    base, model = Net(0), Net(1)
    base.norm.num_batches_tracked.fill_(5)
    before, other = (copy.deepcopy(net.state_dict()) for net in (base, model))
    delta = TaskVector.from_checkpoints(base, model)
    with torch.no_grad():
        model.first.weight.add_(1)
    applied = delta.apply_to(base, 0.5)
    assert type(applied) is Net
    held, ours = applied.state_dict(), base.state_dict()
    assert all(torch.equal(t, before[n]) for n, t in ours.items())
    assert_close(held, combine(lambda a, b: (a + b) / 2, before, other))
    assert int(held["norm.num_batches_tracked"]) == 5
    assert not {t.data_ptr() for t in held.values()} & {t.data_ptr() for t in ours.values()}


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    base, model = save(tmp_path / "base", toy()), save(tmp_path / "model", tuned(toy(), 1))
    shared = torch.arange(6.0).reshape(2, 3)
    file = tmp_path / "delta.safetensors"
    twins = TaskVector({"a": shared, "b": shared, "c": shared.T})
    for made in (TaskVector.from_checkpoints(base, model), twins):
        made.save(file)
        loaded = TaskVector.load(str(file))
        assert set(loaded.tensors) == set(made.tensors)
        assert all(torch.equal(loaded.tensors[n], t) for n, t in made.tensors.items())
        assert loaded.norm() == made.norm()
    fails(r"none\.safetensors", TaskVector.load, tmp_path / "none.safetensors")


# Rules, whose formulas are tested on their own


def test_every_rule_is_that_of_its_name() -> None:
    vectors, numbers = [vector(i, scale=1 + i) for i in range(3)], [14, 21, 28]
    sources = [Source(f"m{i}", num_examples=k, num_steps=k) for i, k in enumerate(numbers)]
    updates = [Update(v.tensors, source) for v, source in zip(vectors, sources, strict=True)]
    for name, found, params in (
        ("task_arithmetic", task_arithmetic(vectors), {}),
        ("fedavg", fedavg(vectors, numbers), {}),
        ("fednova", fednova(vectors, numbers), {}),
        ("fedgma", fedgma(vectors, 0.6), {"rho": 0.6}),
        ("median", median(vectors, middle="lower"), {"middle": "lower"}),
        ("cclip", cclip(vectors, 50.0), {"rho": 50.0}),
    ):
        wanted = dict(aggregate(build_rule(name, params), updates))
        assert all(torch.equal(found.tensors[n], t) for n, t in wanted.items()), name
    fails("4 numbers for 3 task vectors", fednova, vectors, [*numbers, 3])
