"""Who holds what, in numbers."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Description:
    """`counts` is int64 (K, L), the samples of each class at each client; `sizes` and `classes`
    (how many a client holds) are int64 (K,). `left_out`, int64 (L,), counts the samples that no
    client has; `duplicates` those that are given out more than once, each time after the first.
    """

    counts: Tensor
    sizes: Tensor
    classes: Tensor
    smallest: int
    largest: int
    left_out: Tensor
    duplicates: int


def describe(shards: Sequence[Tensor], labels: Tensor, num_classes: int) -> Description:
    """Count what `shards` (int64 positions into `labels`) hold; `labels` is int64 (N,) in 0 ..
    num_classes - 1.
    """
    positions = torch.cat(list(shards))
    counts = torch.stack([torch.bincount(labels[rows], minlength=num_classes) for rows in shards])
    sizes = counts.sum(1)
    uses = torch.bincount(positions, minlength=len(labels))
    return Description(
        counts,
        sizes,
        (counts > 0).sum(1),
        int(sizes.min()),
        int(sizes.max()),
        torch.bincount(labels[uses == 0], minlength=num_classes),
        int((uses - 1).clamp(min=0).sum()),
    )
