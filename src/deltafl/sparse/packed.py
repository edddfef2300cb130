"""Kept coordinates of one flat vector, and deltas that hold the kept values only."""

from collections.abc import Mapping
from itertools import accumulate

import torch
from torch import Tensor

from deltafl.algebra.tensors import Lazy, Spec
from deltafl.sparse.masks import Mask


def kept_index(
    mask: Mask, slices: Mapping[str, slice], device: torch.device | str = "cpu"
) -> Tensor:
    """Where in `Net.flat`, whose `slices` these are, the kept coordinates are: int32 (k,),
    ascending.
    """
    kept = torch.cat([mask[name].reshape(-1) for name in slices])
    return kept.nonzero()[:, 0].to(device, torch.int32)


class PackedDelta(Lazy):
    """A delta that is zero but at kept coordinates; only the block that is asked for is expanded.

    kept: values (k,), on the device of `index`, int32 (k,), which many deltas may share. shapes: of
    all tensors, in the order of the flat vector. Every block equals the dense delta's bit for bit.
    """

    def __init__(self, kept: Tensor, index: Tensor, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.kept, self.index = kept, index
        self.names = self._specs = {n: Spec(s, kept.dtype, kept.device) for n, s in shapes.items()}
        ends = accumulate((spec.numel for spec in self._specs.values()), initial=0)
        self._starts = dict(zip(shapes, ends, strict=False))

    def spec(self, name: str) -> Spec:
        return self._specs[name]

    def read(self, name: str, start: int, stop: int, out: Tensor) -> None:
        """Frozen elements are exactly 0."""
        begin = self._starts[name] + start
        ends = torch.tensor([begin, begin + stop - start], device=self.index.device)
        first, last = torch.searchsorted(self.index, ends.int()).tolist()
        places = self.index[first:last].long().sub_(begin)
        values = self.kept[first:last].to(out)
        out.zero_().index_copy_(0, places.to(out.device), values)
