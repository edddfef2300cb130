import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deltafl.algebra.aggregate import aggregate
from deltafl.algebra.deltas import Update
from deltafl.algebra.tensors import BLOCK, Spec
from deltafl.sparse.packed import PackedDelta, kept_index
from laws.worlds import rules, source

SHAPES = {"head": (3,), "embedding": (BLOCK + 3,), "scale": (), "none": (0, 3), "weight": (5, 7)}
TOTAL = 3 + BLOCK + 3 + 1 + 35


def masks(density: float, seed: int = 0, shapes=SHAPES):
    draw = torch.Generator().manual_seed(seed)
    return {n: torch.rand(s, generator=draw) < density for n, s in shapes.items()}


def flat(tensors) -> torch.Tensor:
    return torch.cat([t.reshape(-1) for t in tensors.values()])


def dense_delta(mask, seed: int):
    draw = torch.Generator().manual_seed(seed)
    return {n: torch.where(m, torch.randn(m.shape, generator=draw), 0) for n, m in mask.items()}


def packed(mask, delta, index=None) -> PackedDelta:
    index = flat(mask).nonzero()[:, 0].int() if index is None else index
    return PackedDelta(flat(delta)[index], index, {n: tuple(m.shape) for n, m in mask.items()})


def slices_of(shapes=SHAPES) -> dict[str, slice]:
    start, found = 0, {}
    for name, shape in shapes.items():
        found[name] = slice(start, start := start + torch.Size(shape).numel())
    return found


@given(
    sizes=st.lists(st.integers(0, 30), min_size=1, max_size=5),
    density=st.sampled_from([0.1, 0.5, 1.0]),
    seed=st.integers(0, 99),
)
def test_the_index_against_boolean_indexing(sizes, density, seed):
    shapes = {str(i): (n,) for i, n in enumerate(sizes)}
    mask = masks(density, seed, shapes)
    expected = flat(mask).nonzero()[:, 0]
    index = kept_index(dict(reversed(mask.items())), slices_of(shapes))
    assert index.dtype == torch.int32
    assert torch.equal(index.long(), expected)


@pytest.mark.parametrize("density", [0.0, 0.1, 0.9, 1.0])
def test_a_packed_delta_is_the_dense_one_bit_for_bit(density):
    mask = masks(density)
    dense = dense_delta(mask, 3)
    lazy = packed(mask, dense)
    assert list(lazy) == list(dense)
    for name, tensor in dense.items():
        assert lazy.spec(name) == Spec(tuple(tensor.shape), tensor.dtype, tensor.device)
        assert torch.equal(lazy[name].view(torch.int32), tensor.view(torch.int32))
        for start in range(0, tensor.numel(), 1000):
            part = tensor.reshape(-1)[start : start + 1000]
            block = lazy.block(name, start, start + len(part))
            assert torch.equal(block.view(torch.int32), part.view(torch.int32))
            out = torch.full((len(part),), 7.0, dtype=torch.float64)
            lazy.read(name, start, start + len(part), out)
            assert torch.equal(out, part.double())


@pytest.mark.parametrize("rule", rules(), ids=repr)
def test_every_rule_gives_the_bits_of_dense_deltas(rule):
    mask = masks(0.3)
    base, *dense = (dense_delta(mask, 10 + i) for i in range(1 + (rule.core.num_models or 5)))
    index = kept_index(mask, slices_of())
    held = [packed(mask, d, index) for d in dense]
    one, two = (
        dict(aggregate(rule, [Update(d, source(i)) for i, d in enumerate(deltas)], base=base))
        for deltas in (held, dense)
    )
    assert list(one) == list(two)
    for name in two:
        assert torch.equal(one[name].view(torch.int32), two[name].view(torch.int32)), name
    assert two["embedding"].any(), "the rule gave nothing to compare"


@pytest.mark.gpu
def test_a_gpu_gives_the_cpus_bits():
    mask = masks(0.3)
    dense = dense_delta(mask, 1)
    index = kept_index(mask, slices_of(), "cuda")
    lazy = PackedDelta(flat(dense).cuda()[index], index, SHAPES)
    assert all(torch.equal(lazy[n].cpu(), dense[n]) for n in SHAPES)
