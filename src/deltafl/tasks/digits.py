"""`digits`: scikit-learn's 1,797 handwritten digits (8 x 8, real, bundled) and domain variants of
them.

One fixed partition, stratified and the same in every run, whatever the seed of the task:

    pool        rows  train  val  test   used by
    pretraining  797    597  100   100   digits:pretrain
    tasks       1000    600  200   200   digits (untouched images) and every other variant

No row is in two places, so what a base model saw in `digits:pretrain` is in no task, and a row that
one variant tests on is trained on by none. A variant is a deterministic change of the images, made
on a 16 x 16 canvas and then resized like any other image; the labels stay. Random textures and
places are keyed by the row.
"""

from collections.abc import Callable, Mapping
from functools import cache, partial

import numpy as np
import torch
from scipy import ndimage

from deltafl.errors import DeltaflError, did_you_mean
from deltafl.tasks.images import Images, ImageTask
from deltafl.tasks.inputs import ImageInput
from deltafl.tasks.selection import stratified
from deltafl.tasks.task import SPLITS

CANVAS = 16


def digits(variant: str, inputs: ImageInput) -> ImageTask:
    """The task of one variant; "" is the untouched one. Raises DeltaflError for an unknown name."""
    change = VARIANTS.get(variant or "plain")
    if change is None:
        raise DeltaflError(
            f'unknown variant of digits "{variant}"; {did_you_mean(variant, VARIANTS)}'
        )
    canvas, labels = _canvas()
    pixels = np.rint(change(canvas).clip(0, 1) * 255).astype(np.uint8)
    parts, splits = partition(labels), {}
    for split, rows in zip(SPLITS, parts[:3] if variant == "pretrain" else parts[3:], strict=True):
        images = np.stack([*map(inputs.decode, pixels[rows])])
        splits[split] = Images(torch.from_numpy(images), torch.from_numpy(labels[rows]))
    name = f"digits_{variant}" if variant else "digits"
    return ImageTask(name, splits, tuple("0123456789"))


def partition(labels: np.ndarray) -> list[np.ndarray]:
    """Rows of the pools' splits in the order of the table above, int64 (n,), ascending."""
    rng, free, parts = np.random.default_rng(0), np.arange(len(labels)), []
    for size in (597, 100, 100, 600, 200, 200):
        parts.append(free[stratified(labels[free], size, rng)])
        free = np.setdiff1d(free, parts[-1], assume_unique=True)
    return parts


@cache
def _canvas() -> tuple[np.ndarray, np.ndarray]:
    """All digits, float64 (1797, 16, 16) in [0, 1], each pixel doubled and softened, and labels
    int64 (1797,).
    """
    from sklearn.datasets import load_digits

    flat, labels = load_digits(return_X_y=True)
    images = np.asarray(flat).reshape(-1, CANVAS // 2, CANVAS // 2) / 16
    return _blur(images.repeat(2, axis=1).repeat(2, axis=2)), np.asarray(labels, np.int64)


_blur = partial(
    ndimage.convolve, weights=np.outer([1, 2, 1], [1, 2, 1])[None] / 16, mode="constant"
)


def _shifted(images: np.ndarray) -> np.ndarray:
    """Half as large, in one of the four corners."""
    count, half = len(images), CANVAS // 2
    moved = np.zeros((count, 2, half, 2, half))
    top, left = np.random.default_rng(count).integers(2, size=(count, 2)).T
    small = images.reshape(count, half, 2, half, 2).mean((2, 4))
    moved[np.arange(count), top, :, left] = small
    return moved.reshape(images.shape)


def _scrambled(images: np.ndarray) -> np.ndarray:
    """Cut into strips of two rows, put together in another order, the same for every image."""
    order = np.random.default_rng(len(images)).permutation(CANVAS // 2)
    return images.reshape(-1, CANVAS // 2, 2, CANVAS)[:, order].reshape(images.shape)


_STRIPES = np.add.outer(np.arange(CANVAS), np.arange(CANVAS)) % 6 < 3

VARIANTS: Mapping[str, Callable[[np.ndarray], np.ndarray]] = {
    "plain": np.asarray,
    "pretrain": np.asarray,
    # dark ink on bright paper
    "inverted": lambda images: 1 - images,
    # a quarter turn to the left
    "rotated": lambda images: np.rot90(images, axes=(1, 2)),
    # left and right exchanged
    "mirrored": lambda images: images[:, :, ::-1],
    # in front of a random grain, up to 0.7 as bright as the ink
    "textured": lambda images: np.maximum(
        images, 0.7 * np.random.default_rng(len(images)).random(images.shape)
    ),
    # strokes widened by two pixels on each side, then blurred
    "thick": lambda images: _blur(ndimage.grey_dilation(images, (1, 5, 5), mode="constant")),
    # bright and dark exchanged on diagonal stripes, 3 pixels wide
    "striped": lambda images: np.where(_STRIPES, 1 - images, images),
    "shifted": _shifted,
    # only the edges of the strokes
    "outlined": lambda images: (
        1.5 * ndimage.morphological_gradient(images, (1, 3, 3), mode="constant")
    ),
    "scrambled": _scrambled,
}
"""Name -> change of images, float (N, 16, 16) in [0, 1], ink bright, into such images; what is
random is keyed by their number.
"""
