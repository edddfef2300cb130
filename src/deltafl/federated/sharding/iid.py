"""Every client gets the same mix."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Iid:
    """Stratified dealing: the samples, ordered by class, go round the clients one by one.

    The clients' sizes differ by at most 1, and so do their counts of any one class. Who starts is random.
    """

    def counts(self, totals: np.ndarray, num_clients: int, rng: np.random.Generator) -> np.ndarray:
        place = np.arange(num_clients)[:, None]
        stops = (totals.cumsum() + num_clients - 1 - place) // num_clients
        return rng.permutation(np.diff(stops, axis=1, prepend=0))
