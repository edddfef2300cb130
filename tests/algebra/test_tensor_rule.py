"""Rules of whole tensors: each tensor is combined once, by whoever reads it, one after the other."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from checkpoint_files import python
from deltafl.algebra import streaming
from deltafl.algebra.aggregate import Aggregate, Stepped
from deltafl.algebra.deltas import Update
from deltafl.algebra.streaming import Unit, visit
from deltafl.algebra.tensors import BLOCK
from deltafl.errors import DeltaflError
from deltafl.rules.iso import IsoC
from deltafl.rules.rule import Source, TensorRule
from laws.worlds import ByBlocks, assert_same, make

SHAPES = {"long": (2 * BLOCK + 3,), "matrix": (5, 7), "none": (0, 3), "scale": ()}


@dataclass(frozen=True)
class Counted(TensorRule):
    """The mean, and the shapes that it was given."""

    seen: list[tuple[int, ...]] = field(default_factory=list)

    def combine(self, tensors: Tensor, weights: Sequence[float]) -> Tensor:
        self.seen.append(tuple(tensors.shape))
        return tensors.mean(0)


def test_a_tensor_is_combined_once_however_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    world = make(3, seed=0, shapes=SHAPES)
    updates = [Update(ByBlocks(d), s) for d, s in zip(world.deltas, world.sources, strict=True)]
    rule = Counted()
    aggregate = Aggregate(rule, updates)
    base = {name: torch.zeros_like(tensor) for name, tensor in world.deltas[0].items()}
    stepped = Stepped(base, aggregate, 1.0)
    out = {name: torch.empty(shape).reshape(-1) for name, shape in SHAPES.items()}
    monkeypatch.setattr(streaming, "CHUNK", 1)  # every block is a unit

    def fill(unit: Unit) -> None:
        for name, start, stop in unit:
            stepped.read(name, start, stop, out[name][start:stop])

    specs = {name: stepped.spec(name) for name in stepped}
    for _ in visit(specs, fill, whole=stepped.whole):
        pass
    assert sorted(rule.seen) == sorted((3, *s) for n, s in SHAPES.items() if n != "none")
    assert_same(out, {n: t.reshape(-1) for n, t in dict(aggregate).items()})


def test_a_result_of_another_shape_is_refused() -> None:
    @dataclass(frozen=True)
    class Flat(TensorRule):
        def combine(self, tensors: Tensor, weights: Sequence[float]) -> Tensor:
            return tensors.mean(0).reshape(-1)

    with pytest.raises(
        DeltaflError, match=r"Flat: combine gives \(6,\) torch.float32 for deltas of"
    ):
        dict(Aggregate(Flat(), [Update({"w": torch.ones(2, 3)}, Source("m"))]))


def test_torch_threads_do_not_change_a_bit() -> None:
    world = make(3, seed=0, shapes={"w": (192, 192)})
    before, found = torch.get_num_threads(), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append(dict(Aggregate(IsoC(), world.updates)))
    torch.set_num_threads(before)
    assert_same(*found)


def test_singular_values_that_cannot_be_computed_are_one_line(monkeypatch: pytest.MonkeyPatch):
    def fail(*_: object) -> None:
        raise torch.linalg.LinAlgError("linalg.eigh: the algorithm failed to converge")

    monkeypatch.setattr(torch.linalg, "eigh", fail)
    updates = [Update({"w": torch.ones(2, 3)}, Source("m"))]
    with pytest.raises(DeltaflError, match='tensor "w": iso_c: its singular values cannot be'):
        dict(Aggregate(IsoC(), updates))


MEMORY = """
import torch
from deltafl.algebra.aggregate import Aggregate
from deltafl.algebra.deltas import Update
from deltafl.algebra.tensors import Lazy, Spec, blocks
from deltafl.rules.rule import Source, TensorRule

class Ones(Lazy):
    names = tuple(f"t{i}" for i in range(12))

    def spec(self, name):
        return Spec((2048, 1024), torch.float32)

    def read(self, name, start, stop, out):
        out.fill_(1)

class Mean(TensorRule):
    def combine(self, tensors, weights):
        return tensors.mean(0)

def megabytes(key):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1024

torch.ones(8, 8).mean(0)
aggregate = Aggregate(Mean(), [Update(Ones(), Source(str(i))) for i in range(4)])
out = torch.empty(1 << 18)
open("/proc/self/clear_refs", "w").write("5")  # the highest is counted anew
before = megabytes("VmRSS")
for name in aggregate:
    for start, stop in blocks(aggregate.spec(name).numel):
        aggregate.read(name, start, stop, out)
print(megabytes("VmHWM") - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="measured in /proc")
def test_memory_is_n_times_the_largest_tensor() -> None:
    """Twelve tensors of 8 MB of four models: 32 MB for one of them, 8 for its result, 384 for all.

    Untold what is large, glibc keeps some of the blocks that were freed, or not, as time goes.
    """
    told = python(MEMORY, check=True, env={"MALLOC_MMAP_THRESHOLD_": str(1 << 20)})
    assert 32 <= float(told.stdout) <= 56
