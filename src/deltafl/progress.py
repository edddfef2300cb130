"""How far a piece of work is: the one callback of everything that takes time."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import SupportsFloat, TypeAlias


@dataclass(frozen=True)
class Progress:
    """`done` of `total` parts of the work called `name` are finished.

    numbers: what there is to see on the way, as {"loss": 0.31}; a number may be a tensor, which is
    read only if it is shown. {"unit": "bytes"} says what done and total count.
    """

    name: str
    done: int
    total: int
    numbers: Mapping[str, SupportsFloat | str] = field(default_factory=dict)


OnProgress: TypeAlias = Callable[[Progress], None]
"""Called from the thread that does the work; what it raises ends the work."""


def ignore(progress: Progress) -> None:
    """Show nothing."""
