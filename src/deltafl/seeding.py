"""Random numbers as functions of a key: no draw depends on what was drawn before."""

import hashlib

import torch


def keyed_generator(*key: int | str) -> torch.Generator:
    """A CPU generator for one purpose: keys that differ anywhere give independent streams, equal
    keys the same one.
    """
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))
