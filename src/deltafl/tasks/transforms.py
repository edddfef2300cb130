"""Batched augmentation of images, on whatever device they are. Pure: no argument is modified."""

import torch
from torch import Tensor


def random_crop(images: Tensor, padding: int, generator: torch.Generator) -> Tensor:
    """Each image shifted by up to `padding` pixels in both directions, zeros coming in; same shape and dtype.

    Draws two integers per image from `generator` (on its own device): uniform over the (2 padding + 1)^2 shifts.
    """
    n, _, height, width = images.shape
    shifts = torch.randint(2 * padding + 1, (2, n, 1), generator=generator, device=generator.device)
    rows, columns = shifts.to(images.device)
    rows = rows + torch.arange(height, device=images.device)
    columns = columns + torch.arange(width, device=images.device)
    padded = torch.nn.functional.pad(images, [padding] * 4)
    image = torch.arange(n, device=images.device)[:, None, None]
    # The channel axis, a slice between index tensors, comes out last.
    return padded[image, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def random_flip(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image (N, C, H, W) mirrored left to right with probability one half; same shape and dtype."""
    flips = torch.randint(
        2, (len(images), 1, 1, 1), generator=generator, device=generator.device
    ).bool()
    return torch.where(flips.to(images.device), images.flip(-1), images)
