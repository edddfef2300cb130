"""The updates that candidates of a search share: what rules make of the deltas."""

from collections.abc import Collection
from pathlib import Path
from tempfile import mkdtemp

import torch
from torch import Tensor

from deltafl.algebra.streaming import Unit, visit
from deltafl.algebra.tensors import Lazy, Tensors, lazy
from deltafl.checkpoints.checkpoint import entries_of, open_tensors
from deltafl.checkpoints.writing import plan_shards, write_tensors
from deltafl.pool import shared_like
from deltafl.tasks.task import hash_of


class UpdateCache:
    """Updates by the digest of their bits, in memory as far as they fit into `room`, in bytes.

    One that does not fit beside others is made again when it is asked for; one that does not fit
    alone is read block by block. Two rules whose updates have the same bits (most of a rho grid of
    FedGMA gives the same few) have one digest.
    """

    def __init__(self, room: int, threads: int = 1) -> None:
        self._room, self._threads = room, threads
        self._rules: dict[str, Lazy] = {}
        self._held: dict[str, Tensors] = {}

    def add(self, aggregate: Lazy) -> str:
        """The digest of an update."""
        update = self._update(aggregate)
        digest = hash_of(*(hash_of(update[name] + 0.0) for name in update))  # -0 is 0
        self._rules.setdefault(digest, aggregate)
        self._hold(digest, update)
        return digest

    def get(self, digest: str) -> Tensors:
        """An update that was added."""
        if digest not in self._held:
            self._hold(digest, self._update(self._rules[digest]))
        return self._held[digest]

    def keep(self, digests: Collection[str]) -> None:
        """Let go of all others."""
        self._held = {digest: held for digest, held in self._held.items() if digest in digests}

    def _hold(self, digest: str, update: Tensors) -> None:
        if sum(map(_bytes_in_memory, self._held.values())) > self._room:
            self._held.popitem()  # the one made last, which was above the room
        self._held[digest] = update

    def _update(self, rule: Lazy) -> Tensors:
        specs = map(rule.spec, rule)
        fits = sum(spec.numel * spec.dtype.itemsize for spec in specs) <= self._room
        return self.make(rule) if fits else rule

    def make(self, aggregate: Lazy) -> dict[str, Tensor]:
        """The update as tensors, in float32, on the device that it is computed on."""
        specs = {name: aggregate.spec(name) for name in aggregate}
        made = {n: torch.empty(s.shape, dtype=s.dtype, device=s.device) for n, s in specs.items()}
        if all(tensor.device.type == "cpu" for tensor in made.values()):
            made = shared_like(made)

        def fill(unit: Unit) -> None:
            for name, start, stop in unit:
                aggregate.read(name, start, stop, made[name].view(-1)[start:stop])

        for _ in visit(specs, fill, self._threads, whole=aggregate.whole):
            pass
        return made


def _bytes_in_memory(update: Tensors) -> int:
    return 0 if isinstance(update, Lazy) else sum(tensor.nbytes for tensor in update.values())


def filed(update: Lazy, scratch: Path, threads: int = 1) -> Lazy:
    """The same in a file, in a new folder in `scratch`."""
    folder = Path(mkdtemp(dir=scratch))
    write_tensors(update, plan_shards(entries_of(update), None, 1 << 62), folder, threads=threads)
    return lazy(open_tensors(folder))
