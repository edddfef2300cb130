"""The step that all shardings share: from how many to which."""

import numpy as np
import torch
from torch import Tensor

from deltafl.errors import DeltaflError
from deltafl.federated.sharding.recipe import SHARDINGS, ShardingRecipe


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
