"""Family `digits`: scikit-learn's 1,797 handwritten digits (8 x 8, real, bundled) and domain variants of them.

One fixed partition, stratified and the same in every run, whatever the seed of the task:

    pool        rows  train  val  test   used by
    pretraining  797    597  100   100   digits:pretrain
    tasks       1000    600  200   200   digits (untouched images) and every other variant

No row is in two places, so what a base model saw in `digits:pretrain` is in no task, and a row that one variant
tests on is trained on by none. A variant is a deterministic change of the images, made on a 16 x 16 canvas and then
resized like any other image; the labels stay. Random textures and places are keyed by the row.
"""

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import numpy as np

from deltafl.registry import Registry
from deltafl.tasks.raw import FAMILIES, RawSplit, RawTask, Source
from deltafl.tasks.selection import stratified

CANVAS = 16

Variant = Callable[[np.ndarray, np.random.Generator], np.ndarray]
"""Images as float (N, 16, 16) in [0, 1], ink bright, and a generator -> images of the same shape and range."""

VARIANTS: Registry[Variant] = Registry("variant of digits")


@FAMILIES.register("digits")
def digits(variant: str) -> Source:
    """The source of one variant; "" is the untouched one. Raises `DeltaflError` for an unknown name."""
    name = f"digits_{variant}" if variant else "digits"
    change = VARIANTS[variant or "plain"]

    def opened(scratch: Path) -> RawTask:
        canvas, labels = _canvas()
        changed = change(canvas, np.random.default_rng(len(canvas)))
        pixels = np.rint(changed.clip(0, 1) * 255).astype(np.uint8)
        parts = partition(labels)["pretraining" if variant == "pretrain" else "tasks"]
        splits = {
            split: _split(pixels[rows], labels[rows], f"{name} ({split})")
            for split, rows in parts.items()
        }
        return RawTask(splits, tuple(str(digit) for digit in range(10)))

    return Source(name, opened)


def partition(labels: np.ndarray) -> dict[str, dict[str, np.ndarray]]:
    """Rows of every pool and split, ascending: {pool: {"train" | "val" | "test": int64 (n,)}}."""
    rng = np.random.default_rng(0)
    sizes = {
        "pretraining": {"train": 597, "val": 100, "test": 100},
        "tasks": {"train": 600, "val": 200, "test": 200},
    }
    free = np.arange(len(labels))
    pools: dict[str, dict[str, np.ndarray]] = {}
    for pool, splits in sizes.items():
        pools[pool] = {}
        for split, size in splits.items():
            taken = free[stratified(labels[free], size, rng)]
            pools[pool][split] = taken
            free = np.setdiff1d(free, taken, assume_unique=True)
    return pools


@cache
def _canvas() -> tuple[np.ndarray, np.ndarray]:
    """All digits, float64 (1797, 16, 16) in [0, 1], each pixel doubled and softened, and labels int64 (1797,)."""
    from sklearn.datasets import load_digits

    flat, labels = load_digits(return_X_y=True)
    images = np.asarray(flat).reshape(-1, CANVAS // 2, CANVAS // 2) / 16
    return _blur(images.repeat(2, axis=1).repeat(2, axis=2)), np.asarray(labels, np.int64)


def _split(pixels: np.ndarray, labels: np.ndarray, where: str) -> RawSplit:
    def read(rows: Sequence[int]) -> list[np.ndarray]:
        return [pixels[row] for row in rows]

    return RawSplit(labels, read, where)


def _around(images: np.ndarray) -> np.ndarray:
    """The 3 x 3 neighbourhood of every pixel, (9, N, H, W); outside is 0."""
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1)))
    _, h, w = images.shape
    return np.stack([padded[:, y : y + h, x : x + w] for y in range(3) for x in range(3)])


def _blur(images: np.ndarray) -> np.ndarray:
    weights = np.outer([1, 2, 1], [1, 2, 1]).reshape(9) / 16
    return np.tensordot(weights, _around(images), 1)


@VARIANTS.register("pretrain")
@VARIANTS.register("plain")
def plain(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """As they are."""
    return images


@VARIANTS.register("inverted")
def inverted(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Dark ink on bright paper."""
    return 1 - images


@VARIANTS.register("rotated")
def rotated(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A quarter turn to the left."""
    return np.rot90(images, axes=(1, 2))


@VARIANTS.register("mirrored")
def mirrored(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Left and right exchanged."""
    return images[:, :, ::-1]


@VARIANTS.register("textured")
def textured(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """In front of a random grain, up to 0.7 as bright as the ink."""
    return np.maximum(images, 0.7 * rng.random(images.shape))


@VARIANTS.register("striped")
def striped(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Bright and dark exchanged on diagonal stripes, 3 pixels wide."""
    stripes = np.add.outer(np.arange(CANVAS), np.arange(CANVAS)) % 6 < 3
    return np.where(stripes, 1 - images, images)


@VARIANTS.register("shifted")
def shifted(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Half as large, in one of the four corners."""
    small = images.reshape(-1, CANVAS // 2, 2, CANVAS // 2, 2).mean((2, 4))
    moved = np.zeros_like(images)
    corners = rng.integers(2, size=(len(images), 2)) * (CANVAS // 2)
    for image, digit, (top, left) in zip(moved, small, corners, strict=True):
        image[top : top + CANVAS // 2, left : left + CANVAS // 2] = digit
    return moved


@VARIANTS.register("thick")
def thick(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Strokes widened by two pixels on each side, then blurred."""
    return _blur(_around(_around(images).max(0)).max(0))


@VARIANTS.register("outlined")
def outlined(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Only the edges of the strokes."""
    around = _around(images)
    return 1.5 * (around.max(0) - around.min(0))


@VARIANTS.register("scrambled")
def scrambled(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Cut into strips of two rows, put together in another order, the same for every image."""
    order = rng.permutation(CANVAS // 2)
    return images.reshape(-1, CANVAS // 2, 2, CANVAS)[:, order].reshape(images.shape)
