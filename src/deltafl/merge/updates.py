"""The updates that candidates of a search share: what rules make of the deltas, in memory."""

from collections.abc import Collection

import torch
from torch import Tensor

from deltafl.algebra.aggregate import Aggregate
from deltafl.algebra.streaming import Unit, visit
from deltafl.pool import shared_like
from deltafl.tasks.task import hash_of


class UpdateCache:
    """Updates by the digest of their bits: the last one, and others while they fit into `room`.

    room: bytes. What does not fit is made again when it is asked for. Two rules whose updates have
    the same bits (most of a rho grid of FedGMA gives the same few) have one digest.
    """

    def __init__(self, room: int, threads: int = 1) -> None:
        self._room, self._threads = room, threads
        self._rules: dict[str, Aggregate] = {}
        self._held: dict[str, dict[str, Tensor]] = {}

    def add(self, aggregate: Aggregate) -> str:
        """The digest of an update, which is made here."""
        tensors = self.make(aggregate)
        digest = hash_of(*(hash_of(tensor + 0.0) for tensor in tensors.values()))  # -0 is 0
        self._rules.setdefault(digest, aggregate)
        self._hold(digest, tensors)
        return digest

    def get(self, digest: str) -> dict[str, Tensor]:
        """The tensors of an update that was added."""
        if digest not in self._held:
            self._hold(digest, self.make(self._rules[digest]))
        return self._held[digest]

    def keep(self, digests: Collection[str]) -> None:
        """Let go of all others."""
        self._held = {digest: held for digest, held in self._held.items() if digest in digests}

    def _hold(self, digest: str, tensors: dict[str, Tensor]) -> None:
        if sum(t.nbytes for held in self._held.values() for t in held.values()) > self._room:
            self._held.popitem()  # the one made last, which was above the room
        self._held[digest] = tensors

    def make(self, aggregate: Aggregate) -> dict[str, Tensor]:
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
