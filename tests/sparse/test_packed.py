from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deltafl.algebra.aggregate import Aggregate, aggregate
from deltafl.algebra.deltas import Update
from deltafl.algebra.tensors import (
    BLOCK,
    Spec,
    blocks,
)
from deltafl.errors import DeltaflError
from deltafl.sparse.packed import STRIDE, KeptIndex, PackedDelta, index_of, packed_difference
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
    index = index or KeptIndex.of(mask.values())
    return PackedDelta(
        index.gather(flat(delta)), index, {n: tuple(m.shape) for n, m in mask.items()}
    )


@given(
    sizes=st.lists(
        st.integers(0, 30) | st.sampled_from([STRIDE, STRIDE + 5, 2 * STRIDE - 1]), max_size=5
    ),
    density=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    seed=st.integers(0, 99),
    data=st.data(),
)
def test_the_index_against_boolean_indexing(sizes, density, seed, data):
    mask = masks(density, seed, {str(i): (n,) for i, n in enumerate(sizes)})
    kept = torch.cat([torch.empty(0, dtype=torch.bool), *mask.values()])
    index = KeptIndex.of(mask.values())
    assert (index.numel, index.count) == (len(kept), int(kept.sum()))
    values = torch.randn(len(kept), generator=torch.Generator().manual_seed(seed))
    assert torch.equal(index.gather(values), values[kept])
    new = torch.randn(index.count, generator=torch.Generator().manual_seed(seed + 1))
    expected = values.clone()
    expected[kept] = new
    assert torch.equal(index.scatter_(values, new), expected)
    start = data.draw(st.integers(0, len(kept)))
    stop = data.draw(st.integers(start, len(kept)))
    assert index.before(start) == int(kept[:start].sum())
    assert torch.equal(index.positions(start, stop), kept[start:stop].nonzero()[:, 0])
    assert torch.equal(index.positions(start, stop), index.decode(start, stop))


@pytest.mark.parametrize("density", [0.0, 0.1, 1.0])
def test_several_blocks(density):
    kept = torch.rand(2 * BLOCK + 77, generator=torch.Generator().manual_seed(1)) < density
    kept[: BLOCK + 5] = True
    index = KeptIndex.of([kept])
    values = torch.arange(len(kept)).float()
    assert torch.equal(index.gather(values), values[kept])
    assert torch.equal(
        index.scatter_(values.clone(), -values[kept]), torch.where(kept, -values, values)
    )
    covered = [(a, b) for _, _, a, b in index.pieces()]
    assert covered[0][0] == 0
    assert covered[-1][1] == index.count
    assert all(one[1] == two[0] for one, two in pairwise(covered))


def test_bytes_of_the_index():
    """One bit an element, and 8 bytes for each 4096 elements."""
    index = KeptIndex.of([torch.ones(BLOCK, dtype=torch.bool)])
    assert index.bits.nbytes == BLOCK // 8
    assert index.num_bytes == BLOCK // 8 + 8 * (BLOCK // STRIDE + 1)


def test_digests_tell_masks_apart():
    digests = {
        KeptIndex.of([torch.tensor(m)]).digest
        for m in ([True], [False], [True, False], [False, True])
    }
    assert len(digests) == 4
    assert KeptIndex.of([torch.tensor([True]), torch.tensor([False])]).digest in digests


@pytest.mark.parametrize("density", [0.0, 0.1, 0.9, 1.0])
def test_a_packed_delta_is_the_dense_one_bit_for_bit(density):
    mask = masks(density)
    dense = dense_delta(mask, 3)
    lazy = packed(mask, dense)
    assert list(lazy) == list(dense)
    for name, tensor in dense.items():
        assert lazy.spec(name) == Spec(tuple(tensor.shape), tensor.dtype, tensor.device)
        assert torch.equal(lazy[name].view(torch.int32), tensor.view(torch.int32))
        for size in (BLOCK, 1000):
            for start, stop in blocks(tensor.numel(), size):
                part = tensor.reshape(-1)[start:stop]
                block = lazy.block(name, start, stop)
                assert torch.equal(block.view(torch.int32), part.view(torch.int32))
                out = torch.full((stop - start,), 7.0, dtype=torch.float64)
                lazy.read(name, start, stop, out)
                assert torch.equal(out, part.double())


def test_zeros_are_positive_and_blocks_the_callers_own():
    mask = masks(0.5)
    lazy = packed(mask, dense_delta(mask, 0))
    assert not torch.signbit(lazy["embedding"][~mask["embedding"]]).any()
    lazy["embedding"].fill_(9)
    assert not (lazy.block("embedding", 0, 100) == 9).any()
    assert not (lazy.kept == 9).any()


def test_membership_expands_nothing(monkeypatch):
    mask = masks(0.5)
    lazy = packed(mask, dense_delta(mask, 0))

    def refuse(*args):
        raise AssertionError("expanded")

    monkeypatch.setattr(lazy, "read", refuse)
    assert "head" in lazy
    assert "absent" not in lazy
    assert len(lazy) == len(SHAPES)


def test_bytes_to_send():
    mask = masks(0.1)
    lazy = packed(mask, dense_delta(mask, 0))
    assert lazy.num_bytes == (4 * int(flat(mask).sum()), -(-TOTAL // 8))


@pytest.mark.parametrize("rule", rules(), ids=repr)
def test_every_rule_gives_the_bits_of_dense_deltas(rule):
    mask = masks(0.3)
    dense = [dense_delta(mask, 10 + i) for i in range(5)]
    index = KeptIndex.of(mask.values())
    one = dict(
        aggregate(rule, [Update(packed(mask, d, index), source(i)) for i, d in enumerate(dense)])
    )
    two = dict(aggregate(rule, [Update(d, source(i)) for i, d in enumerate(dense)]))
    assert list(one) == list(two)
    for name in two:
        assert torch.equal(one[name].view(torch.int32), two[name].view(torch.int32)), name
    assert two["embedding"].any(), "the rule gave nothing to compare"


def test_threads_share_one_index():
    mask = masks(0.3)
    dense = [dense_delta(mask, i) for i in range(4)]
    index = KeptIndex.of(mask.values())
    updates = [Update(packed(mask, d, index), source(i)) for i, d in enumerate(dense)]
    for rule in rules():
        alone, together = Aggregate(rule, updates, threads=1), Aggregate(rule, updates, threads=4)
        assert all(torch.equal(alone[n], together[n]) for n in SHAPES)


def test_a_difference_is_of_kept_coordinates():
    mask = masks(0.2)
    index = KeptIndex.of(mask.values())
    before = torch.randn(TOTAL, generator=torch.Generator().manual_seed(0))
    after = torch.where(flat(mask), before * 1.1, before)
    copies = before.clone(), after.clone()
    delta = packed_difference(after, before, index, SHAPES)
    assert torch.equal(flat(dict(delta)), after - before)
    assert torch.equal(before, copies[0])
    assert torch.equal(after, copies[1])


def test_a_mask_of_another_model_is_refused():
    slices = {"a": slice(0, 3), "b": slice(3, 4)}
    good = {"a": torch.ones(3, dtype=torch.bool), "b": torch.ones((), dtype=torch.bool)}
    assert index_of(dict(reversed(good.items())), slices).count == 4
    with pytest.raises(DeltaflError, match='differ in 1 tensors, such as "b"'):
        index_of({"a": good["a"]}, slices)
    with pytest.raises(DeltaflError, match=r'mask of "a" is \(4,\)'):
        index_of({**good, "a": torch.ones(4, dtype=torch.bool)}, slices)
    with pytest.raises(DeltaflError, match=r"float32"):
        index_of({**good, "a": torch.ones(3)}, slices)


def test_sizes_that_do_not_fit_are_refused():
    index = KeptIndex.of([torch.tensor([True, False, True])])
    with pytest.raises(DeltaflError, match="another mask"):
        PackedDelta(torch.ones(3), index, {"w": (3,)})
    with pytest.raises(DeltaflError, match="another mask"):
        PackedDelta(torch.ones(2), index, {"w": (4,)})
    with pytest.raises(DeltaflError, match="bytes of uint8"):
        KeptIndex(torch.zeros(2, dtype=torch.uint8), 8)
    with pytest.raises(DeltaflError, match="beyond the last"):
        KeptIndex(torch.tensor([8], dtype=torch.uint8), 3)


@pytest.mark.gpu
def test_a_gpu_gives_the_cpus_bits():
    mask = masks(0.3)
    dense = dense_delta(mask, 1)
    here, there = KeptIndex.of(mask.values()), KeptIndex.of(mask.values(), "cuda")
    values = flat(dense)
    assert torch.equal(there.gather(values.cuda()).cpu(), here.gather(values))
    filled = there.scatter_(torch.zeros_like(values, device="cuda"), there.gather(values.cuda()))
    assert torch.equal(filled.cpu(), values)
    lazy = PackedDelta(there.gather(values.cuda()), there, SHAPES)
    assert all(torch.equal(lazy[n].cpu(), dense[n]) for n in SHAPES)
    assert torch.equal(there.positions(5, 1001).cpu(), here.positions(5, 1001))
