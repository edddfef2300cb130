"""From encoded images to uint8 arrays of one size, in threads."""

import io
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from deltafl.errors import DeltaflError
from deltafl.tasks.inputs import ImageInput
from deltafl.tasks.raw import Encoded, RawSplit

BATCH = 512
"""Images decoded between two writes; a thread takes its share at once, for one by one costs 0.03 ms."""


def decode(encoded: Encoded, inputs: ImageInput) -> np.ndarray:
    """One image as uint8 (C, H, W): the short side is brought to `image_size` and the centre taken, as
    CLIP's and ViT's processors do, by Pillow's bicubic with antialiasing.

    Raises whatever Pillow raises for a file that is no image.
    """
    if isinstance(encoded, np.ndarray):
        opened = Image.fromarray(encoded)
    else:
        opened = Image.open(io.BytesIO(encoded) if isinstance(encoded, bytes) else encoded)
    with opened as image:
        if image.mode.startswith(("I", "F")):
            raise ValueError(f"pixels of mode {image.mode} have more than 8 bits")
        upright = ImageOps.exif_transpose(image)
        if upright.mode == "P" and "transparency" in upright.info:
            upright = upright.convert("RGBA")
        coloured = upright.convert("RGB" if inputs.channels == 3 else "L")
        pixels = np.asarray(_resized(coloured, inputs.image_size))
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def _resized(image: Image.Image, size: int) -> Image.Image:
    if image.size == (size, size):
        return image
    short = min(image.size)
    width, height = (size if side == short else size * side // short for side in image.size)
    left, top = (width - size) // 2, (height - size) // 2
    scaled = image.resize((width, height), Image.Resampling.BICUBIC)
    return scaled.crop((left, top, left + size, top + size))


def decoded(split: RawSplit, rows: np.ndarray, inputs: ImageInput) -> Iterator[np.ndarray]:
    """The images of `rows` in order, as batches uint8 (n, C, H, W).

    Raises:
        DeltaflError: an image cannot be decoded; the first such row and its file are named.
    """

    def some(items: Sequence[tuple[int, Encoded]]) -> list[np.ndarray]:
        return [_decoded(row, encoded, split.where, inputs) for row, encoded in items]

    threads = os.cpu_count() or 1
    with ThreadPoolExecutor(threads) as pool:
        for start in range(0, len(rows), BATCH):
            batch = rows[start : start + BATCH].tolist()
            items = list(zip(batch, split.read(batch), strict=True))
            share = -(-len(items) // threads)
            parts = pool.map(some, (items[i : i + share] for i in range(0, len(items), share)))
            yield np.stack([image for part in parts for image in part])


def _decoded(row: int, encoded: Encoded, where: str, inputs: ImageInput) -> np.ndarray:
    try:
        return decode(encoded, inputs)
    except Exception as error:  # Pillow's readers raise many kinds
        place = f" ({encoded})" if isinstance(encoded, Path) else ""
        raise DeltaflError(
            f"row {row} of {where}{place} is not an 8-bit image that can be read: {error}. "
            "Repair the row or remove it."
        ) from error
