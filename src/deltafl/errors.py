"""What a user did wrong, in one line: what, where, and the remedy."""

import difflib
from collections.abc import Callable, Iterable, Sequence
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class DeltaflError(Exception):
    """A mistake in the input. The command line prints it without a traceback and exits with 2.

    `problems` holds one line for each mistake found; `str(error)` is that line, or a numbered list
    of them.
    """

    def __init__(self, *problems: str) -> None:
        self.problems: tuple[str, ...] = tuple(problems)
        super().__init__(*problems)

    def __str__(self) -> str:
        if len(self.problems) == 1:
            return self.problems[0]
        return f"{len(self.problems)} problems:\n" + "\n".join(
            f"  {i}. {p}" for i, p in enumerate(self.problems, 1)
        )


def attempt(
    problems: list[str], work: Callable[P, T], *args: P.args, **kwargs: P.kwargs
) -> T | None:
    """work(*args); None where it ends with a DeltaflError, whose lines are added to `problems`."""
    try:
        return work(*args, **kwargs)
    except DeltaflError as error:
        problems += error.problems
        return None


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """` Did you mean "x"?` for the closest known name, else the list of known names."""
    names = sorted(known)
    if not names:
        return "there is none"
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    return f'did you mean "{close[0]}"?' if close else f"known: {', '.join(names)}"


def brief(value: object) -> str:
    """A value as Python writes it, or of a long one its beginning."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def shorten(names: Sequence[str], most: int = 3) -> str:
    """The first few of many names, with the count of the rest."""
    shown = ", ".join(f'"{n}"' for n in names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
