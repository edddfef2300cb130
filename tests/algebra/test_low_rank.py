"""A kind of lazy tensors of one's own: a low-rank delta, which nothing else needs to know."""

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from deltafl.algebra.aggregate import Aggregate
from deltafl.algebra.deltas import Update
from deltafl.algebra.tensors import BLOCK, Lazy, Spec
from deltafl.rules.rule import Source
from laws.worlds import assert_same, rules


class LowRank(Lazy):
    """scale * B @ A for each name, row blocks of it at a time; A: (rank, columns), B: (rows, rank)."""

    def __init__(self, A: Mapping[str, Tensor], B: Mapping[str, Tensor], scale: float) -> None:
        self.A, self.B, self.scale, self.names = A, B, scale, A

    def spec(self, name: str) -> Spec:
        shape = (self.B[name].shape[0], self.A[name].shape[1])
        return Spec(shape, self.A[name].dtype, self.A[name].device)

    def read(self, name: str, start: int, stop: int, out: Tensor) -> None:
        columns = self.A[name].shape[1]
        first, last = start // columns, -(-stop // columns)
        rows = (self.B[name][first:last] @ self.A[name]).mul_(self.scale)
        out.copy_(rows.view(-1)[start - first * columns : stop - first * columns])


SHAPES = {"wide": (5, BLOCK // 3), "tall": (4 * BLOCK // 1000, 1001), "small": (3, 2)}


def adapter(seed: int, rank: int = 2) -> LowRank:
    draw = torch.Generator().manual_seed(seed)
    A = {n: torch.randn(rank, c, generator=draw) for n, (_, c) in SHAPES.items()}
    B = {n: torch.randn(r, rank, generator=draw) for n, (r, _) in SHAPES.items()}
    return LowRank(A, B, 0.25)


@pytest.mark.parametrize("rule", [r for r in rules() if type(r).__name__ != "Dare"], ids=repr)
def test_every_rule_merges_it_as_the_dense_delta(rule) -> None:
    sources = [Source(f"m{i}", 10 + i, 5 + i, 0.01, 0.9, 0.5) for i in range(3)]
    low = [Update(adapter(i), s) for i, s in enumerate(sources)]
    dense = [Update(dict(u.delta), u.source) for u in low]
    assert_same(dict(Aggregate(rule, low)), dict(Aggregate(rule, dense)))
