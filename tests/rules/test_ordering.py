import itertools

import pytest
import torch

from deltafl.rules.ordering import network, ranks


def all_bits(n: int) -> torch.Tensor:
    """(n, 2^n): every column of zeros and ones."""
    numbers = torch.arange(2**n)
    return torch.stack([(numbers >> i) & 1 for i in range(n)]).to(torch.uint8)


@pytest.mark.parametrize("n", range(1, 18))
def test_the_network_sorts(n):
    """0-1 principle (Knuth vol. 3, 5.3.4): a network that sorts all zeros and ones sorts everything."""
    wires = list(all_bits(n).unbind(0))
    for i, j in network(n):
        assert 0 <= i < j < n
        wires[i], wires[j] = wires[i].minimum(wires[j]), wires[i].maximum(wires[j])
    assert all((a <= b).all() for a, b in itertools.pairwise(wires))


@pytest.mark.parametrize("n", range(1, 13))
def test_a_part_of_the_network_finds_each_rank(n):
    """The same principle for a rank: k zeros or fewer put a one there."""
    block = all_bits(n)
    zeros = n - block.sum(0, dtype=torch.int64)
    for rank, value in enumerate(ranks(block, range(n))):
        assert torch.equal(value.bool(), zeros <= rank)
    for rank in range(n):
        (value,) = ranks(block, [rank])
        assert torch.equal(value.bool(), zeros <= rank)


def test_the_network_is_as_small_as_batchers():
    """Knuth vol. 3, 5.3.4, table 1: Batcher's method for n = 1 .. 16."""
    batcher = [0, 1, 3, 5, 9, 12, 16, 19, 26, 31, 37, 41, 48, 53, 59, 63]
    assert [len(network(n)) for n in range(1, 17)] == batcher
