"""Image data before anything is decoded: labels, class names and a way to read encoded images."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeAlias

import numpy as np

from deltafl.registry import Registry

Encoded: TypeAlias = bytes | Path | np.ndarray
"""An image file's bytes, its path, or pixels already decoded: uint8 (H, W) or (H, W, 3)."""

SPLIT_NAMES = {"train": "train", "test": "test"}
SPLIT_NAMES |= dict.fromkeys(("validation", "valid", "val", "dev"), "val")
"""Names of splits in the wild -> ours."""


class Columns(NamedTuple):
    """Names of columns of a table; the first that it has counts."""

    image: tuple[str, ...] = ("image",)
    label: tuple[str, ...] = ("label",)


@dataclass(frozen=True)
class RawSplit:
    """`labels` is int64 (N,); `read(rows)` gives the encoded images of some rows; `where` names the
    place in errors.
    """

    labels: np.ndarray
    read: Callable[[Sequence[int]], Sequence[Encoded]]
    where: str


def reader(images: Sequence[Encoded] | np.ndarray) -> Callable[[Sequence[int]], list[Encoded]]:
    """How images that are all there are read."""
    return lambda rows: [images[row] for row in rows]


@dataclass(frozen=True)
class RawTask:
    """Splits by name: "train", "test" and, where the data have their own, "val"."""

    splits: Mapping[str, RawSplit]
    class_names: tuple[str, ...]


@dataclass(frozen=True)
class Source:
    """Image data that were found but not yet opened.

    `open(scratch)` may put files into the folder `scratch`, which lives as long as the raw task is
    used. `key` says which content it has, for the cache, so that a warm start never opens the source;
    without one it is decoded afresh each time.
    """

    name: str
    open: Callable[[Path], RawTask]
    key: str = ""


FAMILIES: Registry[Callable[[str], Source]] = Registry("data set family")
"""Name -> builder of a `Source` from the variant's name (what follows the colon in
`digits:inverted`, or "").
"""
