"""A fixed number of classes per client."""

from bisect import bisect_left
from dataclasses import dataclass
from math import ceil, log2

import numpy as np

from deltafl.errors import DeltaflError


@dataclass(frozen=True)
class NonIid:
    """Every client holds exactly `nc` of the L classes; K clients, N samples, n_c of them of class c.

    1. Class c is held by r_c clients, floor(K nc / L) or one more, K nc in all; the largest classes get one more.
    2. Each client takes the nc classes with the largest remaining quota, ties at random. Remaining quotas never
       differ by more than 1, so nobody is left with too few classes. Random trades of classes between two clients
       (degree-preserving swaps, doi 10.1038/ncomms5114) then take out the pattern that this order leaves.
    3. Class c is cut into r_c pieces of at least 1 sample. Given who holds what, the smallest client is as large and
       the largest as small as can be: equal up to 1 where that is possible. Among those cuts one with pieces close to
       n_c / r_c is taken, all of them rounded up or down where that is possible (controlled rounding).

    With K nc < L some classes have no client. That is an error, or with `allow_missing_classes` the smallest classes
    (ties at random) are left out with all their samples.
    """

    nc: int
    allow_missing_classes: bool = False

    def counts(self, totals: np.ndarray, num_clients: int, rng: np.random.Generator) -> np.ndarray:
        """Raises DeltaflError: `nc` is not in 1 .. L, K nc < L, or a class has fewer samples than clients."""
        classes = len(totals)
        if not 1 <= self.nc <= classes:
            raise DeltaflError(
                f"non_iid: nc is {self.nc}, but the samples have {classes} classes; take 1 to {classes}"
            )
        if num_clients * self.nc < classes and not self.allow_missing_classes:
            raise DeltaflError(
                f"non_iid: {num_clients} clients with {self.nc} classes each cannot hold all {classes} classes; "
                "raise nc or num_clients, or set allow_missing_classes to leave samples out"
            )
        quotas = _quotas(totals, num_clients * self.nc, rng)
        short = np.flatnonzero(quotas > totals)
        if len(short):
            raise DeltaflError(
                f"non_iid: {len(short)} classes have fewer samples than clients that hold them, such as one with "
                f"{totals[short[0]]} samples for {quotas[short[0]]} clients; lower nc or num_clients"
            )
        held = _trade(_hand_out(quotas, num_clients, self.nc, rng), rng)
        kept = quotas > 0
        counts = np.zeros(held.shape, np.int64)
        counts[:, kept] = _cut(held[:, kept], totals[kept])
        return counts


def _quotas(totals: np.ndarray, pieces: int, rng: np.random.Generator) -> np.ndarray:
    """How many clients hold each class, int64 (L,) with sum `pieces`."""
    least, more = divmod(pieces, len(totals))
    order = np.lexsort((rng.random(len(totals)), -totals))
    quotas = np.full(len(totals), least)
    quotas[order[:more]] += 1
    return quotas


def _hand_out(
    quotas: np.ndarray, num_clients: int, nc: int, rng: np.random.Generator
) -> np.ndarray:
    """Who holds what, bool (K, L): `nc` in each row, `quotas` in the columns."""
    left, held = quotas.copy(), np.zeros((num_clients, len(quotas)), bool)
    for row in held:
        row[np.lexsort((rng.random(len(left)), -left))[:nc]] = True
        left -= row
    return held


def _trade(held: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Let 5 K random pairs of clients pool the classes that one of them lacks, and deal them out afresh."""
    held = held.copy()
    for _ in range(5 * len(held) if len(held) > 1 else 0):
        a, b = rng.choice(len(held), 2, replace=False)
        pool = rng.permutation(np.flatnonzero(held[a] ^ held[b]))
        first, second = pool[: len(pool) // 2], pool[len(pool) // 2 :]
        held[a, first], held[a, second] = True, False
        held[b, first], held[b, second] = False, True
    return held


def _cut(held: np.ndarray, totals: np.ndarray) -> np.ndarray:
    """Piece sizes int64 (K, L), at least 1 where `held` and 0 elsewhere, whose columns sum to `totals`.

    The attainable client sizes are an M-convex set: one vector has both the largest minimum and the smallest maximum
    (arXiv 1808.07600), so the two bounds are searched one by one.
    """
    clients, everything = len(held), int(totals.sum())
    share, most = totals / held.sum(0), totals - held.sum(0) + 1

    def cut(smallest: int, largest: int, slack: float) -> np.ndarray | None:
        low = np.maximum(1, np.floor(share / slack)).astype(np.int64)
        high = np.minimum(most, np.ceil(share * slack)).astype(np.int64)
        return _flow(held, totals, low, high, smallest, largest)

    widest = int(totals.max())
    below, above = everything // clients, -(-everything // clients)
    upper = range(above, everything + 1)
    largest = upper[bisect_left(upper, True, key=lambda size: cut(0, size, widest) is not None)]
    lower = range(below, 0, -1)
    smallest = lower[
        bisect_left(lower, True, key=lambda size: cut(size, everything, widest) is not None)
    ]
    steps = range(ceil(16 * log2(widest)) + 1)
    step = bisect_left(steps, True, key=lambda s: cut(smallest, largest, 2 ** (s / 16)) is not None)
    pieces = cut(smallest, largest, 2 ** (step / 16))
    assert pieces is not None
    return pieces


def _flow(
    held: np.ndarray,
    totals: np.ndarray,
    low: np.ndarray,
    high: np.ndarray,
    smallest: int,
    largest: int,
) -> np.ndarray | None:
    """Pieces between `low` and `high` (by class) with client sizes in `smallest` .. `largest`, or None.

    A maximum flow source -> class -> client -> sink of what goes beyond `low`. A client's flow up to `smallest` goes
    straight to the sink; what is above passes a node that lets through only what remains once all have that much.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import maximum_flow

    clients, classes = held.shape
    fixed = held @ low
    need, room = np.maximum(0, smallest - fixed), largest - np.maximum(smallest, fixed)
    extra = totals - held.sum(0) * low
    beyond = int(extra.sum() - need.sum())
    if room.min() < 0 or extra.min() < 0 or beyond < 0:
        return None
    client, kind = np.nonzero(held)
    source, sink, gate = clients + classes, clients + classes + 1, clients + classes + 2
    each = np.arange(clients)
    edges = [
        (np.full(classes, source), clients + np.arange(classes), extra),
        (clients + kind, client, (high - low)[kind]),
        (each, np.full(clients, sink), need),
        (each, np.full(clients, gate), room),
        (np.array([gate]), np.array([sink]), np.array([beyond])),
    ]
    starts, ends, capacity = (np.concatenate(parts) for parts in zip(*edges, strict=True))
    graph = coo_array(
        (capacity.astype(np.int32), (starts, ends)), shape=(gate + 1, gate + 1)
    ).tocsr()
    found = maximum_flow(graph, source, sink)
    if found.flow_value < extra.sum():
        return None
    flow = found.flow.toarray()[clients:source, :clients].T
    return np.where(held, low + flow, 0).astype(np.int64)
