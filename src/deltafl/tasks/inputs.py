"""What a model takes: images of one size, or tokens. A task is loaded for it."""

from __future__ import annotations

import io
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from deltafl.errors import DeltaflError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class ImageInput:
    """Square images of `image_size` pixels, `(x / 255 - mean) / std` in each channel; one value
    stands for all channels.

    Raises:
        DeltaflError: another number of means or deviations.
    """

    image_size: int
    channels: int = 3
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)

    def __post_init__(self) -> None:
        if {len(self.mean), len(self.std)} - {1, self.channels}:
            raise DeltaflError(
                f"mean and std of images need one value for each of {self.channels} channels, or "
                f"one for all, not {self.mean} and {self.std}"
            )

    def decode(self, encoded: dict | np.ndarray) -> np.ndarray:
        """One image, pixels uint8 (H, W) or a cell with an image file's bytes, else its path, as
        uint8 (C, H, W): the short side is brought to `image_size` and the centre taken, as CLIP's
        and ViT's processors do, by Pillow's bicubic with antialiasing.

        Raises whatever Pillow raises for a file that is no image.
        """
        if isinstance(encoded, np.ndarray):
            opened = Image.fromarray(encoded)
        else:
            held = encoded["bytes"]
            opened = Image.open(encoded["path"] if held is None else io.BytesIO(held))
        with opened as image:
            if image.mode.startswith(("I", "F")):
                raise ValueError(f"pixels of mode {image.mode} have more than 8 bits")
            upright = ImageOps.exif_transpose(image)
            if upright.mode == "P" and "transparency" in upright.info:
                upright = upright.convert("RGBA")
            pixels = upright.convert("RGB" if self.channels == 3 else "L")
        size, short = self.image_size, min(pixels.size)
        width, height = (size * side // short for side in pixels.size)
        left, top = (width - size) // 2, (height - size) // 2
        pixels = pixels.resize((width, height), Image.Resampling.BICUBIC)
        pixels = pixels.crop((left, top, left + size, top + size))
        return np.asarray(pixels).reshape(size, size, -1).transpose(2, 0, 1)

    def normalise(self, images: Tensor) -> Tensor:
        """uint8 (B, C, H, W) -> float32 (B, C, H, W), on the images' device, channels last in
        memory.

        On a CPU that layout makes convolutions up to 2.3 times faster (MobileNetV1); shape and
        values are the same.

        Raises:
            DeltaflError: the images have another number of channels or another size.
        """
        expected = (self.channels, self.image_size, self.image_size)
        if tuple(images.shape[1:]) != expected:
            raise DeltaflError(
                f"the images are {tuple(images.shape[1:])} (channels, height, width), "
                f"the model takes {expected}; load the data with image_size={self.image_size}, "
                f"channels={self.channels}"
            )
        mean, std = (_at_pixels(v, self.image_size, images.device) for v in (self.mean, self.std))
        # Permuted as bytes: a permuting copy to floats takes twice as long.
        pixels = images.permute(0, 2, 3, 1).contiguous()
        floats = pixels.to(torch.float32, copy=True)
        return floats.div_(255).sub_(mean).div_(std).permute(0, 3, 1, 2)


@cache
def _at_pixels(values: tuple[float, ...], size: int, device: torch.device) -> Tensor:
    """float32 (size, size, C), a channel's value at every pixel: loops over (1, 1, C) are short."""
    with torch.inference_mode(False):
        return torch.tensor(values, device=device).expand(size, size, -1).contiguous()


@dataclass(frozen=True)
class TextInput:
    """Token ids of `tokenizer`, at most `max_length` of them in one example."""

    tokenizer: PreTrainedTokenizerBase
    max_length: int
