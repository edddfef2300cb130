"""Masks of a net by functions that know encoders only; goes when the sparse room uses `Net`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deltafl.models import Net
from deltafl.models.encoder import encoder_of
from deltafl.models.fit import classifier_of
from deltafl.models.flat import FlatModel
from deltafl.models.heads import LinearHead
from deltafl.sparse.eligible import eligible
from deltafl.sparse.masks import Mask, model_hash, save_mask


def encoder_view(net: Net) -> FlatModel:
    """A copy of the encoder inside a classifier."""
    return FlatModel(encoder_of(net.copy_to(net.device)))


def head_view(net: Net) -> LinearHead:
    """Its head, frozen."""
    head = classifier_of(net).head
    assert head is not None
    return LinearHead.of(head)


def of_net(net: Net, mask: Mask) -> dict[str, Tensor]:
    """The mask of an encoder for all that trains of the net: of a head everything."""
    names = {name: name.removeprefix("encoder.") for name in net.slices}
    ones = {n: torch.ones(t.shape, dtype=torch.bool) for n, t in net.trained.items()}
    return {n: mask.get(names[n], ones[n]) for n in names}


def of_encoder(mask: Mask) -> dict[str, Tensor]:
    """The mask of a net's encoder by its own names."""
    return {n.removeprefix("encoder."): m for n, m in mask.items() if n.startswith("encoder.")}


def save_net_mask(net: Net, mask: Mask, path: Path, about: Mapping[str, Any]) -> None:
    """As `save_mask`, by the names of the encoder."""
    save_mask(of_encoder(mask), path, model_hash(encoder_view(net)), about)


def count_eligible(net: Net) -> int:
    """Number of coordinates that a mask may keep."""
    return eligible(encoder_view(net)).total
