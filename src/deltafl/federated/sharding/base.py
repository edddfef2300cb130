"""What a sharding is, and the step that all of them share: from how many to which."""

from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from deltafl.errors import DeltaflError
from deltafl.registry import Registry


class Sharding(Protocol):
    """How many samples of each class each client gets.

    `counts(totals, num_clients, rng)` takes the sizes of the classes that occur, int64 (L,), all positive, and at
    least one sample per client; it returns int64 (K, L) whose columns sum to `totals`, or to 0 for a class left out.
    """

    def counts(
        self, totals: np.ndarray, num_clients: int, rng: np.random.Generator
    ) -> np.ndarray: ...


SHARDINGS: Registry[type[Sharding]] = Registry("sharding")
"""Name -> frozen dataclass of its parameters."""


def shard(
    labels: Tensor, num_clients: int, sharding: Sharding, generator: torch.Generator
) -> tuple[Tensor, ...]:
    """Divide samples among clients: for each client the sorted int64 positions of its samples.

    The shards are disjoint and cover every sample, except the classes that `NonIid` was allowed to leave out; every
    client has at least one. `sharding` says how many of each class, `generator` (CPU) decides which. `labels` is
    int64 (N,); the classes are those that occur in it.

    Raises:
        DeltaflError: labels of another form, fewer samples than clients, or what `sharding` says cannot be done.
    """
    if labels.dtype != torch.int64 or labels.ndim != 1:
        raise DeltaflError(
            f"labels are {labels.dtype} {tuple(labels.shape)}; sharding takes torch.int64 (N,)"
        )
    if num_clients < 1:
        raise DeltaflError(f"num_clients is {num_clients}; take at least 1")
    if num_clients > len(labels):
        raise DeltaflError(
            f"num_clients is {num_clients}, but there are {len(labels)} samples; take fewer clients"
        )
    words = torch.randint(1 << 32, (4,), generator=generator).tolist()
    rng = np.random.default_rng(words)
    _, inverse, totals = np.unique(labels.cpu().numpy(), return_inverse=True, return_counts=True)
    counts = sharding.counts(totals, num_clients, rng)
    held: list[list[np.ndarray]] = [[] for _ in range(num_clients)]
    for column, shares in enumerate(counts.T):
        rows = rng.permutation(np.flatnonzero(inverse == column))
        for client, piece in enumerate(np.split(rows, np.cumsum(shares))[:-1]):
            held[client].append(piece)
    return tuple(torch.from_numpy(np.sort(np.concatenate(pieces))) for pieces in held)
