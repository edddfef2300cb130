"""Class mixes drawn from a Dirichlet distribution."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from deltafl.errors import DeltaflError, did_you_mean

Form = Literal["hsu", "label"]
DRAWS = 100


@dataclass(frozen=True)
class Dirichlet:
    """Small `alpha`: few classes per client; large `alpha`: close to iid. Two forms, both using every sample.

    - `hsu` (arXiv 1909.06335): client k draws its class mix q_k ~ Dir(alpha p), p the classes' shares of all samples,
      and then samples without replacement by q_k, renormalised over the classes that are not used up. Sizes differ by
      at most 1. The clients are filled one after another in random order, so the last ones get what is left.
    - `label`: class c draws its clients' proportions ~ Dir(alpha, ..., alpha) and is cut by them, so sizes differ.
      A draw that leaves a client without a sample is repeated, up to 100 times.
    """

    alpha: float
    form: Form = "hsu"

    def counts(self, totals: np.ndarray, num_clients: int, rng: np.random.Generator) -> np.ndarray:
        """Raises DeltaflError: `alpha` or `form` is wrong, or 100 draws of `label` all left a client empty."""
        if not (self.alpha > 0 and math.isfinite(self.alpha)):
            raise DeltaflError(
                f"dirichlet: alpha is {self.alpha}; take a positive finite number, such as 0.3"
            )
        if self.form not in get_args(Form):
            raise DeltaflError(
                f'dirichlet: unknown form "{self.form}"; {did_you_mean(self.form, get_args(Form))}'
            )
        if self.form == "hsu":
            return _by_client(totals, num_clients, self.alpha, rng)
        for _ in range(DRAWS):
            counts = _by_class(totals, num_clients, self.alpha, rng)
            if counts.sum(1).all():
                return counts
        raise DeltaflError(
            f'dirichlet: form "label" left a client of {num_clients} without samples in each of {DRAWS} draws '
            f'(alpha {self.alpha}, {totals.sum()} samples); raise alpha, take fewer clients, or form "hsu"'
        )


def _by_client(
    totals: np.ndarray, num_clients: int, alpha: float, rng: np.random.Generator
) -> np.ndarray:
    """Form `hsu`. Draws of a used-up class are rejected and drawn again, which is sampling one by one."""
    left = totals.copy()
    size, extra = divmod(int(totals.sum()), num_clients)
    rows = []
    for place in range(num_clients):
        mix = _draw(alpha * (totals / totals.sum()), rng)
        row, wanted = np.zeros_like(totals), size + (place < extra)
        while wanted:
            chance = mix * (left > 0)
            if not chance.sum() > 0:  # every class of the mix is used up
                chance = left.astype(float)
            drawn = np.minimum(rng.multinomial(wanted, chance / chance.sum()), left)
            row, left, wanted = row + drawn, left - drawn, wanted - int(drawn.sum())
        rows.append(row)
    return rng.permutation(np.stack(rows))


def _by_class(
    totals: np.ndarray, num_clients: int, alpha: float, rng: np.random.Generator
) -> np.ndarray:
    """Form `label`: class c is cut at floor(n_c times the cumulative proportions)."""
    columns = []
    for total in totals:
        cuts = np.floor(_draw(np.full(num_clients, alpha), rng).cumsum() * total).astype(np.int64)
        cuts[-1] = total
        columns.append(np.diff(np.minimum(cuts, total), prepend=0))
    return np.stack(columns, axis=1)


def _draw(alphas: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """One draw of Dir(alphas), also for tiny `alphas`: log gamma(a) = log gamma(a + 1) + log(u) / a."""
    alphas = np.maximum(alphas, 1e-300)  # below, log(u) / a is not finite
    logs = np.log(rng.standard_gamma(alphas + 1)) + np.log1p(-rng.random(len(alphas))) / alphas
    shares = np.exp(logs - logs.max())
    return shares / shares.sum()
