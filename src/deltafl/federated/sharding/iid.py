"""Every client gets the same mix."""

import numpy as np

from deltafl.federated.sharding.recipe import SHARDINGS, ShardingRecipe


@SHARDINGS.register("iid")
def iid(totals: np.ndarray, recipe: ShardingRecipe, rng: np.random.Generator) -> np.ndarray:
    """Stratified dealing: the samples, ordered by class, go round the clients one by one.

    The clients' sizes differ by at most 1, and so do their counts of any one class. Who starts is
    random.
    """
    place = np.arange(recipe.num_clients)[:, None]
    stops = (totals.cumsum() + recipe.num_clients - 1 - place) // recipe.num_clients
    return rng.permutation(np.diff(stops, axis=1, prepend=0))
