"""From encoded images to uint8 arrays of one size, in threads."""

import io
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, ImageOps

from deltafl.errors import DeltaflError
from deltafl.tasks.source import Encoded, RawSplit

BATCH = 256
"""Images decoded between two writes."""

Resize = Literal["crop", "stretch"]


@dataclass(frozen=True)
class Geometry:
    """The form that a model reads: `channels` (1 or 3) x `size` x `size`.

    `crop` brings the short side to `size` and takes the centre, as CLIP's and ViT's processors do; `stretch` ignores
    the aspect ratio. Both are Pillow's bicubic with antialiasing.
    """

    size: int
    channels: int = 3
    resize: Resize = "crop"


def decode(encoded: Encoded, geometry: Geometry) -> np.ndarray:
    """One image as uint8 (C, H, W). Raises whatever Pillow raises for a file that is no image."""
    with _open(encoded) as image:
        if image.mode.startswith(("I", "F")):
            raise ValueError(f"pixels of mode {image.mode} have more than 8 bits")
        upright = ImageOps.exif_transpose(image)
        if upright.mode == "P" and "transparency" in upright.info:
            upright = upright.convert("RGBA")
        pixels = np.asarray(
            _resized(upright.convert("RGB" if geometry.channels == 3 else "L"), geometry)
        )
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def _open(encoded: Encoded) -> Image.Image:
    if isinstance(encoded, np.ndarray):
        return Image.fromarray(encoded)
    return Image.open(io.BytesIO(encoded) if isinstance(encoded, bytes) else encoded)


def _resized(image: Image.Image, geometry: Geometry) -> Image.Image:
    size = geometry.size
    if image.size == (size, size):
        return image
    if geometry.resize == "stretch":
        return image.resize((size, size), Image.Resampling.BICUBIC)
    short = min(image.size)
    width, height = (size if side == short else size * side // short for side in image.size)
    left, top = (width - size) // 2, (height - size) // 2
    scaled = image.resize((width, height), Image.Resampling.BICUBIC)
    return scaled.crop((left, top, left + size, top + size))


def decoded(split: RawSplit, rows: np.ndarray, geometry: Geometry) -> Iterator[np.ndarray]:
    """The images of `rows` in order, as batches uint8 (n, C, H, W).

    Raises `DeltaflError` with the row and the file of the first image that cannot be decoded.
    """

    def one(row: int, encoded: Encoded) -> np.ndarray:
        try:
            return decode(encoded, geometry)
        except (
            OSError,
            SyntaxError,
            ValueError,
            TypeError,
            AttributeError,
            Image.DecompressionBombError,
        ) as error:
            place = f" ({encoded})" if isinstance(encoded, Path) else ""
            raise DeltaflError(
                f"row {row} of {split.where}{place} is not an 8-bit image that can be read: {error}. "
                "Repair the row or remove it."
            ) from error

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for start in range(0, len(rows), BATCH):
            batch = rows[start : start + BATCH].tolist()
            yield np.stack(list(pool.map(one, batch, split.read(batch))))
