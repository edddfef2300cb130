"""Kept coordinates of one flat vector as packed bits, and deltas that hold the kept values only."""

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from deltafl.algebra.tensors import BLOCK, Lazy, Spec, Tensors, blocks, lazy
from deltafl.errors import DeltaflError
from deltafl.sparse.masks import Mask

STRIDE = 1 << 12
"""Elements between two stored counts: 8 bytes for 512 bytes of bits, and no place is farther from a known count."""

CUDA_BLOCK = 1 << 22
"""Elements at once on a GPU, where calls cost more than caches save."""


class NumBytes(NamedTuple):
    """Bytes of kept values, and of the packed index that says where they belong."""

    values: int
    index: int


class KeptIndex:
    """Which of M elements are kept: bit i % 8 of byte i // 8, uint8 (ceil(M / 8),), and counts every STRIDE elements.

    numel: M. count: k, the number of kept elements. Positions are decoded block by block; nothing of M bools or
    integers is ever alive. On the CPU numpy decodes, on a GPU torch does.
    """

    def __init__(self, bits: Tensor, numel: int) -> None:
        if bits.dtype != torch.uint8 or bits.shape != (-(-numel // 8),):
            raise DeltaflError(
                f"{numel} elements need {-(-numel // 8)} bytes of uint8, not {tuple(bits.shape)}"
            )
        packed = bits.cpu().numpy()
        if numel % 8 and packed[-1] >> (numel % 8):
            raise DeltaflError(
                f"bits are set beyond the last of {numel} elements; is the index damaged?"
            )
        self.bits, self.numel = bits, numel
        starts = np.arange(0, len(packed), STRIDE // 8)
        counts = [
            int(np.bitwise_count(packed[s : s + STRIDE // 8]).sum(dtype=np.int64)) for s in starts
        ]
        self._before = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts, dtype=np.int64)])
        self.count = int(self._before[-1])
        self._last: tuple[int, int, Tensor] | None = None

    @classmethod
    def of(cls, masks: Iterable[Tensor], device: torch.device | str = "cpu") -> "KeptIndex":
        """The index of boolean tensors laid end to end, as `FlatModel.flat` lays out its tensors."""
        packed: list[np.ndarray] = []
        rest = np.empty(0, dtype=bool)
        numel = 0
        for mask in masks:
            flat = mask.reshape(-1)
            numel += len(flat)
            for start, stop in blocks(len(flat)):
                rest = np.concatenate([rest, flat[start:stop].cpu().numpy()])
                whole = len(rest) // 8 * 8
                packed.append(np.packbits(rest[:whole], bitorder="little"))
                rest = rest[whole:]
        packed.append(np.packbits(rest, bitorder="little"))
        return cls(torch.from_numpy(np.concatenate(packed)).to(device), numel)

    @property
    def device(self) -> torch.device:
        """Where the bits are, and gathered and scattered values must be."""
        return self.bits.device

    @property
    def num_bytes(self) -> int:
        """Bytes of the bits and the counts."""
        return self.bits.numel() + self._before.nbytes

    @property
    def digest(self) -> str:
        """sha256 of M and the bits."""
        return hashlib.sha256(
            f"{self.numel} ".encode() + self.bits.cpu().numpy().tobytes()
        ).hexdigest()

    def before(self, position: int) -> int:
        """Number of kept elements below `position`."""
        base = position // STRIDE
        known = int(self._before[base])
        return (
            known
            if position % STRIDE == 0
            else known + int(self._flags(base * STRIDE, position).sum())
        )

    def pieces(self) -> Iterator[tuple[int, int, int, int]]:
        """(start, stop, first, last): elements [start, stop) hold kept values [first, last); blocks without are left
        out.
        """
        for start, stop in blocks(self.numel, BLOCK if self.device.type == "cpu" else CUDA_BLOCK):
            first, last = int(self._before[start // STRIDE]), int(self._before[-(-stop // STRIDE)])
            if first < last:
                yield start, stop, first, last

    def positions(self, start: int, stop: int) -> Tensor:
        """int64: kept elements of [start, stop), counted from `start`, ascending. The last answer is remembered, for
        many deltas with one index are read block by block together.
        """
        last = self._last
        if last is None or last[:2] != (start, stop):
            last = self._last = (start, stop, self.decode(start, stop))
        return last[2]

    def decode(self, start: int, stop: int) -> Tensor:
        """As `positions`, nothing remembered."""
        flags = self._flags(start, stop)
        return (
            torch.from_numpy(flags.nonzero()[0])
            if isinstance(flags, np.ndarray)
            else flags.nonzero()[:, 0]
        )

    def _flags(self, start: int, stop: int) -> "np.ndarray | Tensor":
        """bool (stop - start,): whether each element is kept."""
        first = start // 8
        part = self.bits[first : -(-stop // 8)]
        if part.device.type == "cpu":
            flags = np.unpackbits(part.numpy(), count=stop - 8 * first, bitorder="little").view(
                bool
            )
        else:
            flags = (
                (part[:, None] >> torch.arange(8, dtype=torch.uint8, device=part.device) & 1)
                .bool()
                .reshape(-1)
            )
        return flags[start - 8 * first : stop - 8 * first]

    def gather(self, values: Tensor) -> Tensor:
        """Kept elements of `values` (M,), as (k,)."""
        kept = torch.empty(self.count, dtype=values.dtype, device=values.device)
        for start, stop, first, last in self.pieces():
            if last - first == stop - start:
                kept[first:last] = values[start:stop]
            else:
                torch.index_select(
                    values[start:stop], 0, self.decode(start, stop), out=kept[first:last]
                )
        return kept

    def scatter_(self, values: Tensor, kept: Tensor) -> Tensor:
        """Write `kept` (k,) to its places in `values` (M,), which is returned; other elements stay as they are."""
        for start, stop, first, last in self.pieces():
            if last - first == stop - start:
                values[start:stop] = kept[first:last]
            else:
                values[start:stop].index_copy_(0, self.decode(start, stop), kept[first:last])
        return values


def index_of(
    mask: Mask, slices: Mapping[str, slice], device: torch.device | str = "cpu"
) -> KeptIndex:
    """The index of a mask over `FlatModel.flat`, whose `slices` these are.

    Raises:
        DeltaflError: the mask holds other tensors, other sizes or another dtype than the model.
    """
    if set(mask) != set(slices):
        odd = sorted(set(mask) ^ set(slices))
        raise DeltaflError(
            f'mask and model differ in {len(odd)} tensors, such as "{odd[0]}"; make a mask for this model'
        )
    for name, part in slices.items():
        if mask[name].dtype != torch.bool or mask[name].numel() != part.stop - part.start:
            raise DeltaflError(
                f'mask of "{name}" is {tuple(mask[name].shape)} {mask[name].dtype}, '
                f"the model has {part.stop - part.start} elements; make a mask for this model"
            )
    return KeptIndex.of((mask[name] for name in slices), device)


class PackedDelta(Lazy):
    """A delta that is zero but at kept coordinates, as a lazy mapping: only the block that is asked for is expanded.

    kept: values (k,), in the order of `index`, on its device. shapes: of all tensors, in the order of the flat vector.
    Every block equals the dense delta's bit for bit. Many deltas may share one index. onto: a model whose values stand
    at the other coordinates instead of zero: this is then a trained model, of which only the kept values are held.

    Raises:
        DeltaflError: the sizes of values, index and shapes differ.
    """

    def __init__(
        self,
        kept: Tensor,
        index: KeptIndex,
        shapes: Mapping[str, tuple[int, ...]],
        onto: Tensors | None = None,
    ) -> None:
        self._onto = None if onto is None else lazy(onto)
        self.kept, self.index, self._shapes = kept, index, dict(shapes)
        self.names = self._shapes
        self._starts: dict[str, int] = {}
        total = 0
        for name, shape in self._shapes.items():
            self._starts[name] = total
            total += math.prod(shape)
        if kept.shape != (index.count,) or total != index.numel:
            raise DeltaflError(
                f"{tuple(kept.shape)} values for {index.count} kept of {index.numel}, the tensors have {total}; "
                "was the delta made with another mask?"
            )

    @property
    def num_bytes(self) -> NumBytes:
        """Bytes to send: the values each time, the bits of the index once."""
        return NumBytes(self.kept.numel() * self.kept.element_size(), self.index.bits.numel())

    def spec(self, name: str) -> Spec:
        return Spec(self._shapes[name], self.kept.dtype, self.kept.device)

    def read(self, name: str, start: int, stop: int, out: Tensor) -> None:
        """Frozen elements are exactly 0, or those of `onto`."""
        begin = self._starts[name] + start
        first = self.index.before(begin)
        places = self.index.positions(begin, begin + stop - start)
        if self._onto is None:
            out.zero_()
        else:
            self._onto.read(name, start, stop, out)
        out.index_copy_(0, places, self.kept[first : first + len(places)].to(out.dtype))


def packed_difference(
    after: Tensor, before: Tensor, index: KeptIndex, shapes: Mapping[str, tuple[int, ...]]
) -> PackedDelta:
    """after - before, both (M,), at the kept coordinates."""
    return PackedDelta(index.gather(after).sub_(index.gather(before)), index, shapes)
