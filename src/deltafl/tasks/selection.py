"""Which rows go where: stratified, seeded, exact in size."""

from collections.abc import Mapping

import numpy as np

MOST_HELD_OUT = 5000
"""Rows of train that become the validation split, at most."""


def select(
    labels: Mapping[str, np.ndarray], seed: int, val_fraction: float = 0.1, limit: int | None = None
) -> dict[str, tuple[str, np.ndarray]]:
    """For each of "train", "val" and "test": the split of the data that it comes from, and its
    rows, ascending.

    labels: int64 (N,) for "train", "test" and, where the data have it, "val"; else
    min(val_fraction N, `MOST_HELD_OUT`) rows, at least one, are held out of train; no
    class is emptied. limit: rows of each split, at
    most, in which every class has its share.
    """
    rows = {split: (split, np.arange(len(own))) for split, own in labels.items()}
    if "val" not in labels:
        train, every = labels["train"], rows["train"][1]
        count = max(1, min(round(val_fraction * len(train)), MOST_HELD_OUT))
        val = stratified(train, count, np.random.default_rng([seed, 0]), leave=1)
        rows |= {"train": ("train", np.setdiff1d(every, val)), "val": ("train", val)}
    for number, split in enumerate(("train", "val", "test"), 1):
        (origin, own), rng = rows.pop(split), np.random.default_rng([seed, number])
        rows[split] = origin, own[stratified(labels[origin][own], limit or len(own), rng)]
    return rows


def stratified(
    labels: np.ndarray, count: int, rng: np.random.Generator, *, leave: int = 0
) -> np.ndarray:
    """Rows of a random subset in which every class has its share, int64 (count,), ascending.

    Class c gets floor or ceil of n_c * count / N (largest remainders first), and at least `leave`
    of its rows stay outside. The result is shorter than `count` only where `leave` forces it.
    """
    _, inverse, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    room = sizes - leave
    shares = sizes * (min(count, len(labels)) / max(len(labels), 1))
    quotas = np.minimum(np.floor(shares + 1e-9).astype(np.int64), room)
    while (missing := min(count, room.sum()) - quotas.sum()) > 0:
        open_ = np.flatnonzero(quotas < room)
        quotas[open_[np.argsort(quotas[open_] - shares[open_], kind="stable")][:missing]] += 1
    rows = [rng.permutation(np.flatnonzero(inverse == c))[:q] for c, q in enumerate(quotas)]
    return np.sort(np.concatenate([np.empty(0, np.int64), *rows]))
