"""Client sharding: which client holds which examples. A way to shard is one registered function."""

from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, TypeAlias

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from deltafl.errors import DeltaflError
from deltafl.recipes import Incidental, Recipe, one_of
from deltafl.registry import Registry
from deltafl.tasks.recipe import DataRecipe


class ShardingRecipe(Recipe):
    """Which clients there are and what each of them holds."""

    num_clients: int = Field(100, ge=1, description="K, the clients in all")
    sharding: Annotated[str, one_of(lambda: SHARDINGS)] = Field(
        "iid", description="who holds which classes (or sources): iid, non_iid or dirichlet"
    )
    nc: int | None = Field(None, ge=1, description="of non_iid: the classes of each client")
    allow_missing_classes: bool = Field(
        False, description="of non_iid: leave classes out where not all can be held"
    )
    alpha: float | None = Field(
        None, gt=0, description="of dirichlet: small is uneven, large is close to iid"
    )

    def problems(self) -> Iterator[str]:
        given = self.model_dump(exclude_defaults=True)
        for name, sharding in _PARAMETERS.items():
            if name in given and sharding != self.sharding:
                yield f"{name} is of sharding {sharding}, not of {self.sharding}; leave it out"
        for name in ("nc", "alpha"):
            if name not in given and _PARAMETERS[name] == self.sharding:
                yield f"sharding {self.sharding} needs {name}"


class ShardsRecipe(Recipe):
    """Which client would hold which training examples of a task."""

    data: DataRecipe
    sharding: ShardingRecipe = Field(default_factory=ShardingRecipe.of)
    image_size: int = Field(8, ge=1, description="size of images, for a task of your own")
    channels: int = Field(3, ge=1, description="channels of images, for a task of your own")
    seed: int = Field(0, description="of the validation split and of the shards")
    out: Annotated[str | None, Incidental] = Field(
        None, description="a folder for report.html, figure.png and shards.json"
    )
    overwrite: Annotated[bool, Incidental] = Field(False, description="replace an existing output")


_PARAMETERS = {"nc": "non_iid", "allow_missing_classes": "non_iid", "alpha": "dirichlet"}
"""Setting -> the sharding that it is of."""

Sharding: TypeAlias = Callable[[np.ndarray, ShardingRecipe, np.random.Generator], np.ndarray]
"""(sizes of the groups, int64 (L,), all positive; recipe; what is random) -> int64 (K, L), how many
examples of each group each client gets: columns sum to the sizes, or to 0 for a group left out.
There are at least K examples."""

SHARDINGS: Registry[Sharding] = Registry("sharding")


def shard(groups: Tensor, recipe: ShardingRecipe, generator: torch.Generator) -> tuple[Tensor, ...]:
    """Divide examples among clients: for each client the sorted int64 positions of its examples.

    The shards are disjoint and cover every example, except groups that `non_iid` was allowed to
    leave out; every client has at least one. The sharding says how many of each group, `generator`
    (CPU) decides which. `groups` is int64 (N,), see `Task.groups`; the groups are those that occur
    in it.

    Raises:
        DeltaflError: groups of another form, fewer examples than clients, or what the recipe says
            cannot be done.
    """
    if groups.dtype != torch.int64 or groups.ndim != 1:
        raise DeltaflError(
            f"groups are {groups.dtype} {tuple(groups.shape)}; sharding takes torch.int64 (N,)"
        )
    if recipe.num_clients > len(groups):
        raise DeltaflError(
            f"num_clients is {recipe.num_clients}, but there are {len(groups)} samples; "
            "take fewer clients"
        )
    words = torch.randint(1 << 32, (4,), generator=generator).tolist()
    rng = np.random.default_rng(words)
    _, inverse, totals = np.unique(groups.numpy(), return_inverse=True, return_counts=True)
    counts = SHARDINGS[recipe.sharding](totals, recipe, rng)
    held: list[list[np.ndarray]] = [[] for _ in range(recipe.num_clients)]
    for column, shares in enumerate(counts.T):
        rows = rng.permutation(np.flatnonzero(inverse == column))
        for client, piece in enumerate(np.split(rows, np.cumsum(shares))[:-1]):
            held[client].append(piece)
    return tuple(torch.from_numpy(np.sort(np.concatenate(pieces))) for pieces in held)


def shard_counts(shards: Sequence[Tensor], groups: Tensor, num_groups: int) -> dict[str, Tensor]:
    """Count what `shards`, int64 positions into `groups`, hold; `groups` is int64 (N,) in 0 ..
    num_groups - 1.

    counts: int64 (K, L), the examples of each group at each client. sizes, classes (how many a
    client holds): int64 (K,). smallest, largest: of the sizes. left_out: int64 (L,), examples that
    no client has. duplicates: how many are given out more than once, each time after the first.
    """
    counts = torch.stack([torch.bincount(groups[rows], minlength=num_groups) for rows in shards])
    uses = torch.bincount(torch.cat(list(shards)), minlength=len(groups))
    sizes = counts.sum(1)
    return {
        "counts": counts,
        "sizes": sizes,
        "classes": (counts > 0).sum(1),
        "smallest": sizes.min(),
        "largest": sizes.max(),
        "left_out": torch.bincount(groups[uses == 0], minlength=num_groups),
        "duplicates": (uses - 1).clamp(min=0).sum(),
    }


@SHARDINGS.register("iid")
def iid(totals: np.ndarray, recipe: ShardingRecipe, rng: np.random.Generator) -> np.ndarray:
    """Stratified dealing: the samples, ordered by class, go round the clients one by one.

    The clients' sizes differ by at most 1, and so do their counts of any one class. Who starts is
    random.
    """
    place = np.arange(recipe.num_clients)[:, None]
    stops = (totals.cumsum() + recipe.num_clients - 1 - place) // recipe.num_clients
    return rng.permutation(np.diff(stops, axis=1, prepend=0))


@SHARDINGS.register("dirichlet")
def dirichlet(totals: np.ndarray, recipe: ShardingRecipe, rng: np.random.Generator) -> np.ndarray:
    """Client k draws its class mix q_k ~ Dir(alpha p), p the classes' shares of all samples, and
    then samples without replacement by q_k, renormalised over the classes that are not used up
    (arXiv 1909.06335).

    Small `alpha`: few classes per client; large: close to iid. Sizes differ by at most 1. The
    clients are filled one after another in random order, so the last ones get what is left.
    """
    assert recipe.alpha is not None
    left = totals.copy()
    size, extra = divmod(int(totals.sum()), recipe.num_clients)
    rows = []
    for place in range(recipe.num_clients):
        mix = rng.dirichlet(np.maximum(recipe.alpha * (totals / totals.sum()), 1e-300))
        row, wanted = np.zeros_like(totals), size + (place < extra)
        while wanted:  # draws of a used-up class are drawn again: the same as one by one
            chance = mix * (left > 0)
            if not chance.sum() > 0:  # every class of the mix is used up
                chance = left.astype(float)
            drawn = np.minimum(rng.multinomial(wanted, chance / chance.sum()), left)
            row, left, wanted = row + drawn, left - drawn, wanted - int(drawn.sum())
        rows.append(row)
    return rng.permutation(np.stack(rows))


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
