"""Class mixes drawn from a Dirichlet distribution."""

import numpy as np

from deltafl.federated.sharding.recipe import SHARDINGS, ShardingRecipe


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
        mix = _draw(recipe.alpha * (totals / totals.sum()), rng)
        row, wanted = np.zeros_like(totals), size + (place < extra)
        while wanted:  # draws of a used-up class are drawn again: the same as one by one
            chance = mix * (left > 0)
            if not chance.sum() > 0:  # every class of the mix is used up
                chance = left.astype(float)
            drawn = np.minimum(rng.multinomial(wanted, chance / chance.sum()), left)
            row, left, wanted = row + drawn, left - drawn, wanted - int(drawn.sum())
        rows.append(row)
    return rng.permutation(np.stack(rows))


def _draw(alphas: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """One draw of Dir(alphas), also for tiny `alphas`: log gamma(a) = log gamma(a + 1) + log(u) /
    a.
    """
    alphas = np.maximum(alphas, 1e-300)  # below, log(u) / a is not finite
    logs = np.log(rng.standard_gamma(alphas + 1)) + np.log1p(-rng.random(len(alphas))) / alphas
    shares = np.exp(logs - logs.max())
    return shares / shares.sum()
