"""Batched image operations on whatever device the images are on. Pure: arguments are never modified."""

from collections.abc import Sequence

import torch
from torch import Tensor


def normalize(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """`(images / 255 - mean) / std`.

    `images` is uint8 (N, C, H, W); `mean` and `std` have C values in units of [0, 1]. Returns float32 (N, C, H, W).
    """
    scale = (
        torch.tensor(std, dtype=torch.float32, device=images.device)
        .mul(255)
        .reciprocal()
        .view(-1, 1, 1)
    )
    shift = torch.tensor(mean, dtype=torch.float32, device=images.device).mul(255).view(-1, 1, 1)
    return (images.to(torch.float32) - shift) * scale


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
