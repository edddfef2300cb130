"""From encoded images to uint8 arrays of one size, in threads."""

import io
from collections.abc import Iterator
from multiprocessing.pool import ThreadPool
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageOps

from deltafl.errors import DeltaflError
from deltafl.tasks.inputs import ImageInput

BATCH = 512
"""Images decoded between two writes."""


class RawSplit(NamedTuple):
    """Images before they are decoded: labels int64 (N,), cells of `datasets` (see `decode`), and
    the place in errors.
    """

    labels: np.ndarray
    images: Any
    where: str


def decode(encoded: dict | np.ndarray, inputs: ImageInput) -> np.ndarray:
    """One image, pixels uint8 (H, W) or a cell with an image file's bytes, else its path, as uint8
    (C, H, W): the short side is brought to `image_size` and the centre taken, as CLIP's and ViT's
    processors do, by Pillow's bicubic with antialiasing.

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
        pixels = upright.convert("RGB" if inputs.channels == 3 else "L")
    size, short = inputs.image_size, min(pixels.size)
    if pixels.size != (size, size):
        width, height = (size if side == short else size * side // short for side in pixels.size)
        left, top = (width - size) // 2, (height - size) // 2
        pixels = pixels.resize((width, height), Image.Resampling.BICUBIC)
        pixels = pixels.crop((left, top, left + size, top + size))
    return np.asarray(pixels).reshape(size, size, -1).transpose(2, 0, 1)


def decoded(split: RawSplit, rows: np.ndarray, inputs: ImageInput) -> Iterator[np.ndarray]:
    """The images of `rows` in order, as batches uint8 (n, C, H, W).

    Raises:
        DeltaflError: an image cannot be decoded; its row and file are named.
    """

    def one(row: int, cell: dict) -> np.ndarray:
        try:
            return decode(cell, inputs)
        except Exception as error:  # Pillow's readers raise many kinds
            place = f" ({cell['path']})" if cell and cell["bytes"] is None else ""
            raise DeltaflError(
                f"row {row} of {split.where}{place} is not an 8-bit image that can be read: "
                f"{error}. Repair the row or remove it."
            ) from error

    with ThreadPool() as pool:
        for start in range(0, len(rows), BATCH):
            batch = rows[start : start + BATCH].tolist()
            yield np.stack(pool.starmap(one, zip(batch, split.images[batch], strict=True)))
