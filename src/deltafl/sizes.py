"""Numbers of bytes, as settings and as text."""

import re
from typing import Annotated, TypeAlias

from pydantic import BeforeValidator, WithJsonSchema

from deltafl.recipes import problem

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def parse_size(size: int | str) -> int:
    """ "5GB", "300MiB" or bytes -> bytes. Raises ValueError."""
    found = re.fullmatch(r"\s*([\d.]+(?:[eE]\d+)?)\s*([A-Za-z]*)\s*", str(size))
    try:
        return int(float(found[1]) * UNITS[found[2].upper()]) if found else int("")
    except (ValueError, KeyError, OverflowError):
        raise problem(f'"{size}" is not a size; write 5GB or 300MB') from None


Size: TypeAlias = Annotated[
    int, BeforeValidator(parse_size), WithJsonSchema({"type": ["integer", "string"]})
]
"""Bytes; in a file or an option also as 5GB or 300MiB."""


def as_bytes(count: float) -> str:
    """1234567 -> "1.2 MB"."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
