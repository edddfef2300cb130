"""The correctly rounded task arithmetic in float64, written apart from deltafl, and how far an output is from it."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

CHUNK = 1 << 22
KEPT_BITS = np.uint64(45)
SMALLEST_NORMAL, QUANTUM = 2.0**-126, 2.0**-133


def share_differing(output: Path, base: Path, tuned: Sequence[Path], scaling_coef: float) -> float:
    """Share of the output's bf16 elements that differ from base + lambda * sum(tuned - base), rounded once.

    bf16 has 8 significant bits, so the sum of the differences is exact in float64.
    """
    wrong = total = 0
    places = [tensors(folder) for folder in (base, *tuned)]
    for folder_name, written in tensors(output).items():
        sources = [p[folder_name] for p in places]
        for start in range(0, len(written), CHUNK):
            piece = slice(start, start + CHUNK)
            theta = widen(sources[0][piece])
            update = np.zeros_like(theta)
            for source in sources[1:]:
                update += widen(source[piece]) - theta
            wrong += int(
                np.count_nonzero(to_nearest(theta + scaling_coef * update) != widen(written[piece]))
            )
            total += len(theta)
    return wrong / total


def widen(bits: np.ndarray) -> np.ndarray:
    """The uint16 of bfloat16 -> float64, exactly."""
    return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def to_nearest(values: np.ndarray) -> np.ndarray:
    """The bfloat16 nearest to each float64 (ties to even), as float64: the low 45 of 52 bits are rounded away."""
    bits = values.view(np.uint64)
    half = np.uint64((1 << 44) - 1)
    rounded = ((bits + half + ((bits >> KEPT_BITS) & np.uint64(1))) >> KEPT_BITS << KEPT_BITS).view(
        np.float64
    )
    return np.where(np.abs(values) < SMALLEST_NORMAL, np.rint(values / QUANTUM) * QUANTUM, rounded)


def tensors(folder: Path) -> dict[str, np.ndarray]:
    """The bf16 tensors of a folder of safetensors files as flat, memory-mapped uint16."""
    return dict(found for file in sorted(folder.glob("*.safetensors")) for found in _of_file(file))


def _of_file(file: Path) -> Iterator[tuple[str, np.ndarray]]:
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
    header.pop("__metadata__", None)
    data = np.memmap(file, np.uint8, "r", 8 + length)
    for name, info in header.items():
        start, stop = info["data_offsets"]
        yield name, data[start:stop].view("<u2")
