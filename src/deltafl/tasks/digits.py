"""Family `digits`: scikit-learn's 1,797 handwritten digits (8 x 8, real, bundled) and domain variants
of them.

One fixed partition, stratified and the same in every run, whatever the seed of the task:

    pool        rows  train  val  test   used by
    pretraining  797    597  100   100   digits:pretrain
    tasks       1000    600  200   200   digits (untouched images) and every other variant

No row is in two places, so what a base model saw in `digits:pretrain` is in no task, and a row that
one variant tests on is trained on by none. A variant is a deterministic change of the images, made on
a 16 x 16 canvas and then resized like any other image; the labels stay. Random textures and places are
keyed by the row.
"""

from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path

import numpy as np

from deltafl.errors import DeltaflError, did_you_mean
from deltafl.tasks.raw import FAMILIES, RawSplit, RawTask, Source, reader
from deltafl.tasks.selection import stratified
from deltafl.tasks.task import SPLITS

CANVAS = 16

Variant = Callable[[np.ndarray, np.random.Generator], np.ndarray]
"""Images as float (N, 16, 16) in [0, 1], ink bright, and a generator -> images of the same shape and
range.
"""


@FAMILIES.register("digits")
def digits(variant: str) -> Source:
    """The source of one variant; "" is the untouched one. Raises `DeltaflError` for an unknown name."""
    name = f"digits_{variant}" if variant else "digits"
    change = VARIANTS.get(variant or "plain")
    if change is None:
        raise DeltaflError(
            f'unknown variant of digits "{variant}"; {did_you_mean(variant, VARIANTS)}'
        )

    def opened(scratch: Path) -> RawTask:
        canvas, labels = _canvas()
        changed = change(canvas, np.random.default_rng(len(canvas)))
        pixels = np.rint(changed.clip(0, 1) * 255).astype(np.uint8)
        pool = "pretraining" if variant == "pretrain" else "tasks"
        splits = {
            split: RawSplit(labels[rows], reader(pixels[rows]), f"{name} ({split})")
            for (of, split), rows in partition(labels).items()
            if of == pool
        }
        return RawTask(splits, tuple("0123456789"))

    return Source(name, opened)


def partition(labels: np.ndarray) -> dict[tuple[str, str], np.ndarray]:
    """Rows of every pool and split, int64 (n,), ascending, by the names of both."""
    rng, free = np.random.default_rng(0), np.arange(len(labels))
    parts: dict[tuple[str, str], np.ndarray] = {}
    for pool, sizes in (("pretraining", (597, 100, 100)), ("tasks", (600, 200, 200))):
        for split, size in zip(SPLITS, sizes, strict=True):
            parts[pool, split] = free[stratified(labels[free], size, rng)]
            free = np.setdiff1d(free, parts[pool, split], assume_unique=True)
    return parts


@cache
def _canvas() -> tuple[np.ndarray, np.ndarray]:
    """All digits, float64 (1797, 16, 16) in [0, 1], each pixel doubled and softened, and labels int64
    (1797,).
    """
    from sklearn.datasets import load_digits

    flat, labels = load_digits(return_X_y=True)
    images = np.asarray(flat).reshape(-1, CANVAS // 2, CANVAS // 2) / 16
    return _blur(images.repeat(2, axis=1).repeat(2, axis=2)), np.asarray(labels, np.int64)


def _around(images: np.ndarray) -> np.ndarray:
    """The 3 x 3 neighbourhood of every pixel, (9, N, H, W); outside is 0."""
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1)))
    _, h, w = images.shape
    return np.stack([padded[:, y : y + h, x : x + w] for y in range(3) for x in range(3)])


def _blur(images: np.ndarray) -> np.ndarray:
    return np.tensordot(np.outer([1, 2, 1], [1, 2, 1]).ravel() / 16, _around(images), 1)


def _shifted(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Half as large, in one of the four corners."""
    half = CANVAS // 2
    small = images.reshape(-1, half, 2, half, 2).mean((2, 4))
    moved = np.zeros_like(images)
    corners = rng.integers(2, size=(len(images), 2)) * half
    for image, digit, (top, left) in zip(moved, small, corners, strict=True):
        image[top : top + half, left : left + half] = digit
    return moved


def _outlined(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Only the edges of the strokes."""
    around = _around(images)
    return 1.5 * (around.max(0) - around.min(0))


def _striped(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Bright and dark exchanged on diagonal stripes, 3 pixels wide."""
    stripes = np.add.outer(np.arange(CANVAS), np.arange(CANVAS)) % 6 < 3
    return np.where(stripes, 1 - images, images)


def _scrambled(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Cut into strips of two rows, put together in another order, the same for every image."""
    order = rng.permutation(CANVAS // 2)
    return images.reshape(-1, CANVAS // 2, 2, CANVAS)[:, order].reshape(images.shape)


VARIANTS: Mapping[str, Variant] = {
    "plain": lambda images, rng: images,
    "pretrain": lambda images, rng: images,
    # dark ink on bright paper
    "inverted": lambda images, rng: 1 - images,
    # a quarter turn to the left
    "rotated": lambda images, rng: np.rot90(images, axes=(1, 2)),
    # left and right exchanged
    "mirrored": lambda images, rng: images[:, :, ::-1],
    # in front of a random grain, up to 0.7 as bright as the ink
    "textured": lambda images, rng: np.maximum(images, 0.7 * rng.random(images.shape)),
    # strokes widened by two pixels on each side, then blurred
    "thick": lambda images, rng: _blur(_around(_around(images).max(0)).max(0)),
    "striped": _striped,
    "shifted": _shifted,
    "outlined": _outlined,
    "scrambled": _scrambled,
}
