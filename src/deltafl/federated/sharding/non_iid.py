"""A fixed number of classes per client."""

import numpy as np

from deltafl.errors import DeltaflError
from deltafl.federated.sharding.recipe import SHARDINGS, ShardingRecipe


@SHARDINGS.register("non_iid")
def non_iid(totals: np.ndarray, recipe: ShardingRecipe, rng: np.random.Generator) -> np.ndarray:
    """Every client holds exactly `nc` of the L classes; K clients, n_c samples of class c.

    1. Class c is cut into r_c chunks, equal up to 1 sample; r_c is floor(K nc / L) or one more, K
       nc in all; the largest classes get one more.
    2. Classes are dealt, those of the largest chunks first: the chunks of one class go to as many
       clients, to those that lack most classes, of these to the smallest, ties at random. So what
       is lacking never differs by more than 1, and sizes differ by at most the largest chunk (and
       a sample, where chunks are of two or three).
    3. Random pairs of clients pool the classes that only one of them holds and deal them out afresh
       (degree-preserving swaps, doi 10.1038/ncomms5114), unless one would then be smaller or larger
       than all were: this takes out the pattern that the order of dealing leaves.

    With K nc < L some classes have no client. That is an error, or with `allow_missing_classes` the
    smallest classes (ties at random) are left out with all their samples.

    Raises:
        DeltaflError: `nc` is above L, K nc < L, or a class has fewer samples than chunks.
    """
    nc, clients, classes = recipe.nc or 0, recipe.num_clients, len(totals)
    if nc > classes:
        raise DeltaflError(
            f"non_iid: nc is {nc}, but the samples have {classes} classes; take 1 to {classes}"
        )
    if clients * nc < classes and not recipe.allow_missing_classes:
        raise DeltaflError(
            f"non_iid: {clients} clients with {nc} classes each cannot hold all {classes} classes; "
            "raise nc or num_clients, or set allow_missing_classes to leave samples out"
        )
    least, more = divmod(clients * nc, classes)
    chunks = np.full(classes, least)
    chunks[np.lexsort((rng.random(classes), -totals))[:more]] += 1
    short = np.flatnonzero(chunks > totals)
    if len(short):
        raise DeltaflError(
            f"non_iid: {len(short)} classes have fewer samples than clients that hold them, such "
            f"as one with {totals[short[0]]} samples for {chunks[short[0]]} clients; "
            "lower nc or num_clients"
        )
    return _trade(_deal(totals, chunks, clients, rng), rng)


def _deal(
    totals: np.ndarray, chunks: np.ndarray, num_clients: int, rng: np.random.Generator
) -> np.ndarray:
    """Samples of each class at each client, int64 (K, L), `chunks` of them positive in a column."""
    counts = np.zeros((num_clients, len(totals)), np.int64)
    some = np.maximum(1, chunks)
    for c in np.lexsort((rng.random(len(totals)), -totals / some)):
        held, sizes = (counts > 0).sum(1), counts.sum(1)
        clients = np.lexsort((rng.random(num_clients), sizes, held))[: chunks[c]]
        clients = clients[np.argsort(sizes[clients], kind="stable")]
        counts[clients, c] = totals[c] // some[c] + (np.arange(len(clients)) < totals[c] % some[c])
    return counts


def _trade(counts: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The same after 5 K trades of whole chunks."""
    counts = counts.copy()
    low, high = counts.sum(1).min(), counts.sum(1).max()
    for _ in range(5 * len(counts) if len(counts) > 1 else 0):
        pair = rng.choice(len(counts), 2, replace=False)
        pool = rng.permutation(np.flatnonzero((counts[pair] > 0).sum(0) == 1))
        dealt, chunks = counts[pair], counts[pair].sum(0)
        dealt[:, pool] = 0
        for row, part in zip(dealt, np.array_split(pool, 2), strict=True):
            row[part] = chunks[part]
        if low <= dealt.sum(1).min() and dealt.sum(1).max() <= high:
            counts[pair] = dealt
    return counts
