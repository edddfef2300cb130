"""What a model wrote, judged: the final number, tests that code passes, instructions followed."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from deltafl.tasks.ifeval import follows
from deltafl.tasks.sandbox import passes


class Judge(NamedTuple):
    """What a score is called, and how it judges facts and a text."""

    metric: str
    judge: Callable[[Any, str], float]


def final(text: str) -> str:
    r"""The answer that a text comes to: what stands in the last \boxed{}, else after the last ####
    (GSM8K), else the last number, else all of it. Written without spaces, $, %, thousands' commas,
    \left, \right and small spaces of LaTeX; \dfrac and \tfrac are \frac.
    """
    numbers = r"-?(?:\d[\d,]*)?\.?\d+"
    *_, boxed = [None, *re.finditer(r"\\(?:boxed|fbox)\s*\{", text)]
    if boxed:
        text = _braced(text[boxed.end() :])
    else:
        text = text.rpartition("####")[2]
        found = re.findall(numbers, text)
        text = found[-1] if found else text
    text = re.sub(r"\\(?:left|right|[!,;: ])|\s|\\?[$%]|(?<=\d)\{?,\}?(?=\d{3})", "", text)
    return re.sub(r"\\[dt]frac", r"\\frac", text).rstrip(".")


def _braced(text: str) -> str:
    """`text` up to the brace that closes one opened before it."""
    depth = 1
    for place, letter in enumerate(text):
        depth += (letter == "{") - (letter == "}")
        if not depth:
            return text[:place]
    return text


def exact(answer: str, text: str) -> float:
    """1 where both come to the same: as numbers, where both are, else letter by letter."""
    wanted, found = final(answer), final(text)
    try:
        return float(float(wanted) == float(found))
    except ValueError:
        return float(wanted == found)


def code(text: str) -> str:
    """The code in what a model wrote: the first fenced block, whose end may be missing; else all of
    it, or, if it goes on with an indented body, its lines before the first that is not indented.
    """
    if fenced := re.search(r"```[\w+-]*\n(.*?)(?:```|\Z)", text, re.DOTALL):
        return fenced[1]
    body = re.match(r"(?:[ \t].*(?:\n|\Z)|\s*\n)+", text)
    return body[0] if body and body[0].strip() else text


def passed(program: Sequence[str], text: str) -> float:
    """1 where the code, between the parts of a program, passes its tests."""
    return float(passes(code(text).join(program)))


JUDGES: Mapping[str, Judge] = {
    "exact": Judge("exact match", exact),
    "pass@1": Judge("pass@1", passed),
    "ifeval": Judge("instructions followed", follows),
}
"""Score -> what judges a text that a model wrote."""
