"""Differences of models, and the base's blocks that several of them share."""

import pytest
import torch

from checkpoint_files import toy, tuned
from deltafl.algebra.deltas import CachedBlocks, Difference
from deltafl.algebra.tensors import Joined, Spec
from laws.worlds import ByBlocks, assert_same


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_difference_is_tuned_minus_base_in_its_precision(dtype):
    base = toy(dtype=torch.bfloat16)
    other = tuned(base, 1)
    renamed = {f"x.{n}": t for n, t in other.items()}
    names = {n: (renamed, f"x.{n}") for n in base if n != "steps"}
    assert_same(dict(CachedBlocks(base, dtype)), base)
    for held in (base, ByBlocks(base), CachedBlocks(base, dtype)):
        delta = Difference(held, Joined(names), dtype)
        assert list(delta) == list(names)
        for name in delta:
            want = other[name].to(dtype) - base[name].to(dtype)
            assert delta.spec(name) == Spec(tuple(want.shape), dtype)
            assert torch.equal(delta[name], want)
            narrow = torch.empty(want.numel(), dtype=torch.bfloat16)
            delta.read(name, 0, want.numel(), narrow)
            assert torch.equal(narrow, want.reshape(-1).bfloat16())
