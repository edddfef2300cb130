"""Batched augmentation of images, on whatever device they are. Pure: no argument is modified."""

import torch
from torch import Tensor


def random_crop(images: Tensor, padding: int, generator: torch.Generator) -> Tensor:
    """Each image shifted by up to `padding` pixels in both directions, zeros coming in; same shape
    and dtype.

    Draws two integers per image from `generator` (on its own device): uniform over the (2 padding +
    1)^2 shifts.
    """
    n, _, height, width = images.shape
    shifts = torch.randint(2 * padding + 1, (2, n), generator=generator, device=generator.device)
    windows = (
        torch.nn.functional.pad(images, [padding] * 4).unfold(2, height, 1).unfold(3, width, 1)
    )
    return windows[torch.arange(n), :, *shifts.to(images.device)]


def random_flip(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image (N, C, H, W) mirrored left to right with probability one half; same shape and
    dtype.
    """
    flips = torch.randint(
        2, (len(images), 1, 1, 1), generator=generator, device=generator.device
    ).bool()
    return torch.where(flips.to(images.device), images.flip(-1), images)
