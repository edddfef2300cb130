"""Kept coordinates of one flat vector, and deltas that hold the kept values only."""

from collections.abc import Mapping

import torch
from torch import Tensor

from deltafl.algebra.tensors import Lazy, Spec
from deltafl.errors import DeltaflError
from deltafl.sparse.masks import Mask


def kept_index(
    mask: Mask, slices: Mapping[str, slice], device: torch.device | str = "cpu"
) -> Tensor:
    """Where in `Net.flat`, whose `slices` these are, the kept coordinates are: int32 (k,),
    ascending.

    Raises:
        DeltaflError: the mask holds other tensors, other sizes or another dtype than the model, or
            keeps nothing.
    """
    if odd := sorted(mask.keys() ^ slices.keys()):
        raise DeltaflError(
            f'mask and model differ in {len(odd)} tensors, such as "{odd[0]}"; '
            "make a mask for this model"
        )
    parts = []
    for name, part in slices.items():
        kept = mask[name]
        if kept.dtype != torch.bool or kept.numel() != part.stop - part.start:
            raise DeltaflError(
                f'mask of "{name}" is {tuple(kept.shape)} {kept.dtype}, the model has '
                f"{part.stop - part.start} elements; make a mask for this model"
            )
        parts.append(kept.reshape(-1).nonzero()[:, 0].add_(part.start).to(device, torch.int32))
    index = torch.cat(parts)
    if not len(index):
        raise DeltaflError("the mask keeps no coordinate; choose a lower sparsity")
    return index


class PackedDelta(Lazy):
    """A delta that is zero but at kept coordinates; only the block that is asked for is expanded.

    kept: values (k,), on the device of `index`, int32 (k,), which many deltas may share. shapes: of
    all tensors, in the order of the flat vector. Every block equals the dense delta's bit for bit.

    Raises:
        DeltaflError: there are not as many values as places.
    """

    def __init__(self, kept: Tensor, index: Tensor, shapes: Mapping[str, tuple[int, ...]]) -> None:
        if kept.shape != index.shape:
            raise DeltaflError(
                f"{tuple(kept.shape)} values for {tuple(index.shape)} kept coordinates; "
                "was the delta made with another mask?"
            )
        self.kept, self.index = kept, index
        self.names = self._specs = {
            name: Spec(tuple(shape), kept.dtype, kept.device) for name, shape in shapes.items()
        }
        self._starts: dict[str, int] = {}
        start = 0
        for name, spec in self._specs.items():
            self._starts[name] = start
            start += spec.numel

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
